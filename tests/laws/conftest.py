"""What the laws share with the tests of the export."""

from ..export.registry import one_registry

__all__ = ["one_registry"]
