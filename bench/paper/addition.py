"""What the experiments share with the demo, which lies in another folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "addition"))

import models
import task
from task import Dialect, Problem, answer_of, problems, prompt_text

__all__ = ["Dialect", "Problem", "answer_of", "models", "problems", "prompt_text", "task"]
