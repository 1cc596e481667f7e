"""A sliding window and a memory for pretrained models of transformers (docs/guides/graft.md)."""

from titans.hf.graft.cache import GraftCache
from titans.hf.graft.configuration import GraftConfig
from titans.hf.graft.make import graft
from titans.hf.graft.modeling import GraftedForCausalLM, GraftOutput

__all__ = ["GraftCache", "GraftConfig", "GraftOutput", "GraftedForCausalLM", "graft"]
