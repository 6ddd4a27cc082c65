"""The compiled small operations of a captured step: same numbers, few graphs, and nothing left
behind."""

import sys

import pytest
import torch
from conftest import save_tiny
from transformers import AutoModelForCausalLM

from kvfold.runtime.generate import fused as module
from kvfold.runtime.generate.fused import fused, fusible


@pytest.fixture
def graphs(monkeypatch):
    """Runs what torch.compile traces as it is, without a compiler, and counts the graphs."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    made = {}
    torch._dynamo.reset()
    monkeypatch.setattr(
        module,
        "compiled",
        lambda f: made.setdefault(f, torch.compile(f, dynamic=False, backend=backend)),
    )
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss"])
@torch.no_grad()
def test_a_step_is_the_same_and_its_layers_share_what_is_compiled(family, graphs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        save_tiny(tmp_path / "m", family), dtype=torch.bfloat16
    ).eval()
    ids = torch.randint(1, 128, (2, 1), generator=torch.Generator().manual_seed(0))
    plain = model(ids).logits
    before = {id(m): dict(vars(m)) for m in model.modules()}
    home = sys.modules[type(model).__module__]
    rope = home.apply_rotary_pos_emb
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    with fused(model):
        assert home.apply_rotary_pos_emb is not rope and all("forward" in vars(m) for m in norms)
        first = model(ids).logits
        count = len(graphs)
        assert torch.equal(model(ids).logits, first)
    assert torch.equal(first, plain)
    assert len(graphs) == count  # the second step compiled nothing
    kinds = len({(type(m), m.weight.shape) for m in norms})
    assert kinds + 1 <= count <= kinds + 3  # RoPE of queries and keys, and the MLP
    assert home.apply_rotary_pos_emb is rope
    assert all(vars(m) == before[id(m)] for m in model.modules())


def test_what_routes_tokens_or_has_a_forward_of_its_own_is_left_alone(graphs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "m", "gpt_oss")).eval()
    assert not any(fusible(layer.mlp) for layer in model.model.layers)
    norm = model.model.norm
    assert fusible(norm)
    norm.forward = lambda x: 2 * x
    hooked = norm.forward
    with fused(model):
        assert norm.forward is hooked
    assert norm.forward is hooked


def test_an_error_leaves_the_model_as_it_was(graphs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "m")).eval()
    with pytest.raises(RuntimeError, match="stop"), fused(model):
        raise RuntimeError("stop")
    assert not any("forward" in vars(m) for m in model.modules())


@torch.no_grad()
def test_where_the_compiler_fails_the_step_goes_on(monkeypatch, tmp_path):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    monkeypatch.setattr(
        module, "compiled", lambda f: torch.compile(f, dynamic=False, backend=broken)
    )
    model = AutoModelForCausalLM.from_pretrained(
        save_tiny(tmp_path / "m"), dtype=torch.float32
    ).eval()
    ids = torch.randint(1, 128, (2, 1), generator=torch.Generator().manual_seed(0))
    plain = model(ids).logits
    with fused(model):
        assert torch.equal(model(ids).logits, plain)
    torch._dynamo.reset()


@torch.no_grad()
def test_many_batch_sizes_are_compiled(graphs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        save_tiny(tmp_path / "m"), dtype=torch.float32
    ).eval()
    with fused(model):
        for size in range(1, 12):
            count = len(graphs)
            model(torch.ones(size, 1, dtype=torch.long))
            assert len(graphs) > count, size
