"""The bundle format: manifest, integrity, errors, and the bundle that ships inside."""

from saferedir.engines.bundle import DEFAULT_BUNDLE, EMBEDDED, Bundle, open_bundle
from saferedir.engines.manifest import Manifest

__all__ = ["DEFAULT_BUNDLE", "EMBEDDED", "Bundle", "Manifest", "open_bundle"]
