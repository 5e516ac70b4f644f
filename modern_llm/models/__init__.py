"""Language models and what is computed with them; torch is imported when one of these names is
used.
"""

from importlib import import_module

PLACES = {"ModernDecoderLM": "decoder", "Block": "decoder", "load_model": "saving",
          "save_model": "saving", "VerifierModel": "verifier", "load_verifier": "verifier",
          "generate": "generation", "stream": "generation"}
__all__ = list(PLACES)


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PLACES])
