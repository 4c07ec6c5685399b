# The library says tuple[int] for any length, str for lists of texts, models without their call: Any is truer.
from typing import Any

def __getattr__(name: str) -> Any: ...
