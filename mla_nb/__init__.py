"""Multimodal learning by alternating unimodal adaptation.

`from mla_nb import Run, run, fit, load, Classifier, registry` imports PyTorch only
when it is used.
"""

__version__ = "0.2.0"

from importlib import import_module

_PLACES = {
    "Run": "mla_nb.runs.config",
    "run": "mla_nb.runs.run",
    "fit": "mla_nb.predict",
    "load": "mla_nb.predict",
    "Classifier": "mla_nb.predict",
}
__all__ = [*_PLACES, "registry"]


def _registries():
    "All registries, filled: registry.methods, .encoders, .datasets and .rules"
    from types import SimpleNamespace

    core = import_module("mla_nb.core")
    core.discover()
    names = "methods", "encoders", "datasets", "rules"
    return SimpleNamespace(**{name: getattr(core, name) for name in names})


def __getattr__(name):
    "Import a public name when it is first used (PEP 562)"
    if name == "registry":
        value = _registries()
    elif name in _PLACES:
        value = getattr(import_module(_PLACES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
