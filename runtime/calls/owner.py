"""Methods and hooks of one model object that don't keep it alive: without reference cycles `del
model` frees its weights at once."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any


class Owner:
    """A weak reference to a model. In a deep copy of the model it refers to the copy."""

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)

    def __call__(self) -> Any:
        return self.model()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Owner":
        model = self()
        return Owner(
            memo.get(id(model), model)
        )  # copy puts a copy there before it goes on to its attributes


class Bound:
    """`function` with a model as its first argument, as a method bound to it would be. A subclass
    with such a method would do, but its name would end up in config.json when the model is
    saved."""

    def __init__(self, function: Callable[..., Any], model: Any) -> None:
        self.function, self.owner = function, Owner(model)
        self.__doc__, self.__name__ = function.__doc__, getattr(function, "__name__", "method")
        signature = inspect.signature(function)  # which generate() looks at
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.owner(), *args, **kwargs)
