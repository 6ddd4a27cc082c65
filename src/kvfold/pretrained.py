"""The one door to transformers' Auto classes: Python code that a model's folder carries never runs.

Left alone, transformers asks on the terminal whether to run what `auto_map` in config.json or
tokenizer_config.json names, and one `y` in a pipe runs it. Here the answer is always no: a family
or tokenizer that transformers knows loads as ever, any other is refused in a sentence. A test sees
to it that no other file calls the Auto classes.
"""

import json
import os
from pathlib import Path
from typing import Any

from kvfold.errors import KvfoldError

MOST_NBYTES = 16 << 20  # of config.json; with the names of 10,000 classes it has half of one
MOST = {  # of fields for which transformers makes a list
    "num_labels": 10_000, "num_hidden_layers": 1000, "num_layers": 1000, "n_layer": 1000, "n_layers": 1000,
}  # fmt: skip
CODE_FREE: dict[str, Any] = {"trust_remote_code": False}
KERNEL_FIELDS = (
    "attn_implementation",
    "experts_implementation",
)  # transformers fetches what has a slash from the Hub, and runs it


def config_from_pretrained(path: str | Path, **options: Any) -> Any:
    """`AutoConfig.from_pretrained` of a folder.

    Raises:
        KvfoldError: it can't be read, makes no sense, or needs code of its own.
            What a GGUF raises is the caller's to tell.
    """
    from transformers import AutoConfig

    if "gguf_file" not in options:
        check_fields(path)
    try:
        return AutoConfig.from_pretrained(path, **{**options, **CODE_FREE})
    except Exception as error:  # transformers and huggingface_hub raise a dozen kinds for a field that makes no sense
        refuse_code(path, "config.json", error)
        if "gguf_file" in options:
            raise
        raise KvfoldError(
            f"config.json in '{path}' cannot be used: {reason_of(error)}; give the checkpoint's own config.json."
        ) from error


def tokenizer_from_pretrained(path: str | Path, **options: Any) -> Any:
    """`AutoTokenizer.from_pretrained` of a folder.

    Raises:
        KvfoldError: none is there, it can't be loaded, or it needs code of its own.
            What a GGUF raises is the caller's to tell.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **{**options, **CODE_FREE})
    except Exception as error:  # files of any content: AttributeError, KeyError, the tokenizers library's own Exception
        refuse_code(path, "tokenizer_config.json", error)
        if "gguf_file" in options:
            raise
        raise KvfoldError(
            f"'{path}' holds no tokenizer that can be loaded ({type(error).__name__}: {reason_of(error)}); put the "
            "model's tokenizer files there."
        ) from error


def stock_from_pretrained(path: str | Path, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained` (of a folder with a model of images and text that has
    no other class, `AutoModelForImageTextToText`'s) as transformers has it, whether or not
    `kvfold.register()` holds: of an artifact, the plain model with a 16-bit cache, for instance to
    compare with `kvfold.runtime.load_pretrained`'s in one process.

    Args:
        path: a folder, or a repository of the Hub.
        options: transformers' own, handed on.

    Raises:
        KvfoldError: it needs code of its own. All else is transformers' own error.
    """
    from transformers import AutoModelForCausalLM

    if reads_images(path):
        from transformers import AutoModelForImageTextToText

        return code_free(AutoModelForImageTextToText.from_pretrained, path, **options)
    method: Any = AutoModelForCausalLM.from_pretrained
    stock = getattr(method, "kvfold_stock", method.__func__)
    return code_free(stock.__get__(AutoModelForCausalLM), path, **options)


def reads_images(path: str | Path) -> bool:
    """Whether transformers has a class of images and text for the model in a folder, and none of
    text alone."""
    try:
        return only_with_images(
            json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["model_type"]
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False  # not there, or broken: what reads it says so


def only_with_images(family: str) -> bool:
    """Whether transformers has a class of images and text for a model_type, and none of text
    alone."""
    from transformers.models.auto import modeling_auto

    texts, both = (
        getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        for task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
    )
    return family in both and family not in texts


def code_free(stock: Any, path: Any, *args: Any, **options: Any) -> Any:
    """Calls an Auto class's `from_pretrained` so that no code of the model runs.

    Raises:
        KvfoldError: it needs code of its own. All else is transformers' own error.
    """
    if "gguf_file" not in options:
        check_fields(path)
    try:
        return stock(path, *args, **{**options, **CODE_FREE})
    except ValueError as error:
        refuse_code(path, "config.json", error)
        raise


def model_from_config(config: Any, **options: Any) -> Any:
    """`from_config` of the Auto class that `stock_from_pretrained` takes: a model of random
    weights."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind: Any = (
        AutoModelForImageTextToText if only_with_images(config.model_type) else AutoModelForCausalLM
    )
    return kind.from_config(config, **{**options, **CODE_FREE})


def refuse_code(path: str | Path, file: str, error: Exception) -> None:
    """Raises the sentence if transformers' `error` says that code of the model's own would be
    needed."""
    if "trust_remote_code" not in str(error):
        return
    raise KvfoldError(
        f"'{path}' needs Python code of its own (auto_map in its {file}), which kvfold never runs; give a model whose "
        "family and tokenizer transformers itself knows."
    ) from error


def read_fields(path: str | Path) -> dict[str, Any] | None:
    """config.json of a folder as JSON; None where there is none, or `path` is no folder.

    Raises:
        KvfoldError: it is no file, too large, or no JSON object.
    """
    if not isinstance(path, str | os.PathLike):
        return None
    file = Path(path) / "config.json"
    if not os.path.lexists(file):
        return None
    try:
        if not file.is_file():
            raise ValueError("it is no regular file")
        if file.stat().st_size > MOST_NBYTES:
            raise ValueError(f"it has more than {MOST_NBYTES >> 20} MiB")
        text = file.read_text(encoding="utf-8")
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is not JSON ({reason_of(error)})") from None
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise KvfoldError(
            f"config.json in '{path}' cannot be used: {reason_of(error)}; give the checkpoint's own config.json."
        ) from None
    return fields


def check_fields(path: str | Path) -> None:
    """Refuses a config.json that names a kernel of the Hub, which transformers would fetch and run,
    or whose numbers would have it hang or fill the memory before it looks at them.

    Raises:
        KvfoldError: it does, or it can't be read.
    """
    fields = read_fields(path)
    if fields is None:
        return  # what reads it says so
    for part in [fields, *(value for value in fields.values() if isinstance(value, dict))]:
        for name, most in MOST.items():
            if isinstance(part.get(name), int) and part[name] > most:
                raise KvfoldError(
                    f"config.json in '{path}' has {name} {str(part[name])[:40]}, but there must be {most} at the most; "
                    "give the checkpoint's own config.json."
                )
        for name in KERNEL_FIELDS:
            for key in (name, f"_{name}", f"_{name}_internal"):
                if "/" in str(part.get(key) or ""):
                    raise KvfoldError(
                        f"config.json in '{path}' asks for the kernel '{part[key]}' of the Hub ({key}), which is code "
                        "that kvfold never runs; remove that field."
                    )


def reason_of(error: BaseException) -> str:
    """The last line of an error's message: in those of many lines the one that says what is
    wrong."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__
