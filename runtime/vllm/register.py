"""The entry point of vLLM's plugins, called in each of its processes, and the functions of vLLM's
that are wrapped there. For any other model than an artifact each wrapper calls what it wraps.

    EngineArgs.create_engine_config   an artifact's folder or Hub id turns the packed cache on
    Attention.__init__                its layers are made with our backend, and a 16-bit cache each
    kv_cache_utils.get_kv_cache_groups    the two caches are two groups
"""

import logging
from functools import wraps
from typing import Any

from kvfold.errors import KvfoldError
from kvfold.runtime.vllm.version import check_version, is_tested

log = logging.getLogger("kvfold")


def register() -> None:
    """Wraps vLLM's functions, once. It never raises, since that would end every process of vLLM's,
    whatever the model: what goes wrong is logged, and vLLM is as it was."""
    try:
        import vllm
        from vllm.engine.arg_utils import EngineArgs

        if hasattr(EngineArgs.create_engine_config, "kvfold"):
            return
        version, fault = vllm.__version__, None
        if is_tested(version):
            try:
                wrap_layers()
            except Exception as error:
                fault = error
        wrap_arguments(EngineArgs, version, fault)
    except Exception:
        log.exception("kvfold's plugin is not registered: artifacts get a 16-bit cache")


def wrap_arguments(owner: Any, version: str, fault: Exception | None = None) -> None:
    """Has `create_engine_config` see whether its model is an artifact.

    Args:
        owner: EngineArgs.
        version: of vLLM.
        fault: why layers were not wrapped, if they were to be: then an artifact is refused.
    """
    stock = owner.create_engine_config

    @wraps(stock)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from kvfold.runtime.vllm.settings import check_config, find_artifact, prepare

        folder = find_artifact(
            self.model, self.revision, token=self.hf_token, cache_dir=self.download_dir
        )
        if folder is None:
            return stock(self, *args, **kwargs)
        check_version(version)
        if fault is not None:
            raise KvfoldError(
                f"kvfold's plugin can't be set up in this vLLM {version} ({type(fault).__name__}: {fault}); "
                "install vLLM and kvfold again."
            )
        artifact = prepare(self, folder)
        config = stock(self, *args, **kwargs)
        check_config(config, artifact)
        return config

    create_engine_config.kvfold = True  # type: ignore[attr-defined]
    owner.create_engine_config = create_engine_config


def wrap_layers() -> None:
    """Has layers of an artifact get its caches, and the caches their groups."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.core import kv_cache_utils

    kind: Any = Attention
    stock_init, stock_groups = kind.__init__, kv_cache_utils.get_kv_cache_groups

    @wraps(stock_init)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        from kvfold.runtime.vllm.settings import folder_of

        config = get_current_vllm_config()
        folder = folder_of(config)
        if folder is None:
            stock_init(self, *args, **kwargs)
        else:
            make_served(self, stock_init, config, folder, args, kwargs)

    @wraps(stock_groups)
    def get_kv_cache_groups(config: Any, specs: dict[str, Any]) -> Any:
        from kvfold.runtime.vllm.settings import folder_of

        if folder_of(config) is not None:
            from kvfold.runtime.vllm.specs import register_specs, served_groups

            register_specs()
            if (groups := served_groups(specs)) is not None:
                return groups
        return stock_groups(config, specs)

    kind.__init__ = make
    kv_cache_utils.get_kv_cache_groups = get_kv_cache_groups


def make_served(
    attention: Any, init: Any, config: Any, folder: str, args: tuple, kwargs: dict[str, Any]
) -> None:
    """Makes an attention layer of an artifact.

    Args:
        attention: the new object, and `init` vLLM's own initialiser with its arguments.
        config: VllmConfig.
        folder: the artifact's.
    Raises:
        KvfoldError: the layer computes what is not known over a packed cache.
    """
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )
    from vllm.model_executor.models.utils import extract_layer_index

    from kvfold.runtime.vllm.backend import PackedBackend, serve
    from kvfold.runtime.vllm.layer import served_cache, served_layer
    from kvfold.runtime.vllm.served_kernels import note_layer
    from kvfold.runtime.vllm.settings import drafted
    from kvfold.runtime.vllm.specs import register_specs

    if kwargs.get("attn_backend") is not None:
        raise KvfoldError(
            f"The layer '{kwargs.get('prefix')}' brings an attention of its own, which is not computed over a packed "
            "cache; generate with kvfold.runtime.load_pretrained."
        )
    register_specs()
    init(attention, *args, **{**kwargs, "attn_backend": PackedBackend})
    layer = served_layer(
        folder,
        extract_layer_index(attention.layer_name),
        get_tensor_model_parallel_rank(),
        get_tensor_model_parallel_world_size(),
        config.cache_config.block_size,
    )
    served = serve(attention, layer, config, drafted(config))
    note_layer(served, len(served_cache(folder).specs), config.device_config.device_type)
