"""The demo model behind the real backend."""

from collections.abc import Sequence
from pathlib import Path

from services.inference.engine.backend import FlashAttention, KvType
from services.inference.engine.llama import Llama

DEMO = Path("model/demo.gguf")


def open_demo(
    path: Path = DEMO,
    context: int = 512,
    parallel: int = 4,
    adapters: Sequence[Path] = (),
    kind: type[Llama] = Llama,
    kv_type: KvType = "f16",
    flash_attention: FlashAttention = "auto",
) -> Llama:
    """Compute with one thread: several spin while they wait for each other on busy CPUs."""
    llama = kind(
        path,
        context=context,
        parallel=parallel,
        threads=1,
        gpu_layers=0,
        on_progress=lambda _: True,
        kv_type=kv_type,
        flash_attention=flash_attention,
    )
    for file, adapter in enumerate(adapters, start=1):
        llama.load_adapter(file, adapter)
    return llama


def clear_slots(llama: Llama, parallel: int) -> None:
    for slot in range(parallel):
        llama.truncate(slot, 0)
