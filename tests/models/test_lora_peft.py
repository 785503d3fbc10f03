"""Adapters written here, loaded by PEFT on torch: the same log-probabilities. Needs torch, transformers and peft."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.models.peft import write_adapter
from tests.models.test_lora import FIXTURES, logps, randomized, set_up

pytestmark = [pytest.mark.acceptance, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("llama/tied", {"r": 4, "alpha": 8}),
        ("llama/tied", {"r": 4, "target_modules": ["layers[0:2]/attn/(q|v)", "layers/mlp/up"]}),
        ("llama/biases", {"r": 3, "alpha": 5, "use_rslora": True, "target_modules": ["layers[1:]/.*"]}),
        ("families/phi3", {"r": 2, "alpha": 4}),
        ("families/phi3", {"r": 2, "use_rslora": True, "target_modules": ["layers/attn/(q|v)", "layers[1:]/mlp/gate"]}),
        ("families/qwen3", {"r": 2}),
        ("families/gemma3_text", {"r": 2, "alpha": 4}),
        ("families/mixtral", {"r": 2, "alpha": 4}),
        ("families/qwen3_moe", {"r": 2, "alpha": 4}),
    ],
)
def test_peft_loads_it_and_says_the_same(base: str, settings: dict[str, Any], tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    path = str(FIXTURES / base)
    setup = set_up(path, **settings)
    lora, params = setup.lora, randomized(setup.load())
    assert lora is not None
    write_adapter(tmp_path / "adapter", lora.adapter, params, lora.modules, base=path)
    ids = np.random.default_rng(0).integers(0, setup.config.vocab_size, (2, 24)).astype(np.int32)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        tokens = torch.tensor(ids, dtype=torch.long)
        before = torch.log_softmax(model.eval()(tokens).logits, -1).numpy()
        adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
        expected = torch.log_softmax(adapted(tokens).logits, -1).numpy()
    assert np.abs(expected - before).max() > 0.05
    np.testing.assert_allclose(logps(setup, params, ids), expected, rtol=0, atol=5e-5)
