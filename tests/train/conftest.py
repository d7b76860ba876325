"""Model directories shared by the tests of the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from train.tiny_models import ARCHITECTURES, loaded, save_successor, save_tiny

from opd_train import CausalLM


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each architecture, "teacher" (another Llama) and "successor"."""
    root = tmp_path_factory.mktemp("models")
    paths = {kind: save_tiny(root / kind, kind) for kind in ARCHITECTURES}
    paths["teacher"] = save_tiny(root / "teacher", "llama", seed=1)
    paths["successor"] = save_successor(root / "successor")
    return paths


@pytest.fixture(scope="session", params=ARCHITECTURES)
def any_model(request: pytest.FixtureRequest, models: dict[str, Path]) -> CausalLM:
    """Each architecture in turn."""
    return loaded(models[request.param])


@pytest.fixture(scope="session")
def teacher(models: dict[str, Path]) -> CausalLM:
    """A Llama with other weights than the student's."""
    return loaded(models["teacher"])
