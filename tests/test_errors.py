"""One tree of errors: whatever a package of the product raises on purpose belongs to it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import saferedir.engines
import saferedir.export
import saferedir.runtime
import saferedir_torch
from saferedir.engines import errors
from saferedir.runtime.serve.errors import ServiceError


def test_every_error_class_of_the_product_stands_in_the_one_tree() -> None:
    outside = []
    for package in (saferedir.engines, saferedir.runtime, saferedir.export, saferedir_torch):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.endswith("__main__") or "resvg" in info.name:
                continue
            try:
                module = importlib.import_module(info.name)
            except ModuleNotFoundError:  # an optional package of this module is not installed
                continue
            outside += [
                f"{info.name}.{name}"
                for name, found in inspect.getmembers(module, inspect.isclass)
                if issubclass(found, Exception) and found.__module__ == info.name and info.name != errors.__name__
                if not issubclass(found, ServiceError)  # a service's answer over HTTP
            ]
    assert outside == []


def test_the_tree_that_is_drawn_is_the_tree_that_is() -> None:
    drawn = errors.__doc__ or ""
    classes = [found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, errors.SafeRedirError)]
    assert [found.__name__ for found in classes if found.__name__ not in drawn] == []
