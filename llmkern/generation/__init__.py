# SPDX-License-Identifier: Apache-2.0
"""Writing text with a model: settings, constraints, the decode loop, streaming."""

from llmkern.generation.config import GenerationConfig
from llmkern.generation.loop import GenerationMixin, GenerationOutput
from llmkern.generation.streaming import Streamer, TextStreamer

__all__ = ["GenerationConfig", "GenerationMixin", "GenerationOutput", "Streamer", "TextStreamer"]
