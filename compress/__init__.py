"""The offline pipeline: calibrate, fuse, search, export, evaluate, and the command line."""

import sys as _sys

if (
    __name__ == "compress"
):  # the bare folder, imported from the repository root: hand over the one real module
    import importlib as _importlib

    _sys.modules[__name__] = _importlib.import_module("kvfold.compress")
