"""Strict numerics for every test: 8 emulated CPU devices, no silent promotion, warnings are errors, shapes checked."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp(prefix="posttrain-cache-"))
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook("posttrain", "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "xla-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

SHARED = Path(os.environ.get("POSTTRAIN_SHARED", Path(__file__).parent.parent.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data sets and reference values, for acceptance tests only."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}; set POSTTRAIN_SHARED")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as an imported Hugging Face directory, for acceptance tests only."""
    path = os.environ.get("POSTTRAIN_SMOLLM2", "")
    if not path or not Path(path, "config.json").is_file():
        pytest.skip("POSTTRAIN_SMOLLM2 does not name an imported SmolLM2 directory (see README, Tests)")
    return Path(path)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M as an imported Hugging Face directory, for acceptance tests only."""
    path = os.environ.get("POSTTRAIN_GEMMA3", "")
    if not path or not Path(path, "config.json").is_file():
        pytest.skip("POSTTRAIN_GEMMA3 does not name an imported Gemma 3 270M directory (see README, Tests)")
    return Path(path)
