"""vLLM in the engine process: its own scheduler, cache and kernels, behind our protocol."""

from engine.vllm.engine import VllmEngine
from engine.vllm.pooling import VllmPoolingEngine

__all__ = ["VllmEngine", "VllmPoolingEngine"]
