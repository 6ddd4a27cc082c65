"""The artifact: schema, byte account, writer, reader."""

import sys as _sys

if (
    __name__ == "exports"
):  # the bare folder, imported from the repository root: hand over the one real module
    import importlib as _importlib

    _sys.modules[__name__] = _importlib.import_module("kvfold.exports")
else:

    def __getattr__(name: str) -> object:
        """`exports.push_to_hub`, looked up only when it is asked for: the schema and the account
        need no Hub."""
        if name == "push_to_hub":
            from kvfold.exports.page.hub import push_to_hub

            return push_to_hub
        raise AttributeError(f"module 'kvfold.exports' has no attribute '{name}'")
