# SPDX-License-Identifier: Apache-2.0
"""Models made of llmkern's layers: training loss, saving and loading. What writes text with them is in generation."""

from llmkern.generation import GenerationConfig, GenerationOutput, Streamer, TextStreamer
from llmkern.models.language_model import LanguageModel

__all__ = ["GenerationConfig", "GenerationOutput", "LanguageModel", "Streamer", "TextStreamer"]
