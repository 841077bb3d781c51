# SPDX-License-Identifier: Apache-2.0
"""Text in and out of language models: reading, normalising, tokenizing, batching.

Reading, normalising and batching need nothing beyond llmkern itself; tokenizers, Chinese
segmentation, stop words and stemming come with ``pip install 'llmkern[text]'`` and are loaded when
first used.
"""

from llmkern.text.datasets import (
    CorpusFiles,
    Splits,
    bptt_windows,
    contiguous_lanes,
    corpus_files,
    language_modeling_splits,
)
from llmkern.text.files import read_lines, read_text
from llmkern.text.normalization import normalize
from llmkern.text.preprocessing import remove_stop_words, stem
from llmkern.text.streaming import StreamDecoder
from llmkern.text.tokenizer import Tokenizer

__all__ = [
    "CorpusFiles",
    "Splits",
    "StreamDecoder",
    "Tokenizer",
    "bptt_windows",
    "contiguous_lanes",
    "corpus_files",
    "language_modeling_splits",
    "normalize",
    "read_lines",
    "read_text",
    "remove_stop_words",
    "stem",
]
