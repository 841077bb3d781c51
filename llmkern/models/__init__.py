# SPDX-License-Identifier: Apache-2.0
"""Models made of llmkern's layers: training loss, saving and loading, generation."""

from llmkern.models.generation import GenerationOutput
from llmkern.models.generation_config import GenerationConfig
from llmkern.models.language_model import LanguageModel
from llmkern.models.streaming import Streamer, TextStreamer

__all__ = ["GenerationConfig", "GenerationOutput", "LanguageModel", "Streamer", "TextStreamer"]
