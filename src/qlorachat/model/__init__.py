"""The Llama forward pass on a paged KV cache, with un-merged adapters chosen row by row."""

from qlorachat.model.cache import KVCache
from qlorachat.model.llama import PagedLlama
from qlorachat.model.rows import DecodeRows, GatheredRows, PrefillChunk, PrefillChunks, Rows
from qlorachat.model.support import unsupported

__all__ = [
    "DecodeRows",
    "GatheredRows",
    "KVCache",
    "PagedLlama",
    "PrefillChunk",
    "PrefillChunks",
    "Rows",
    "unsupported",
]
