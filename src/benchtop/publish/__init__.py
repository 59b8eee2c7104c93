"""What executes, checks and prints the book; chapters never import it."""

import sys

# jsonschema (behind nbformat) imports this optional package, which builds a grammar for 1.2 s; nothing here checks IRIs.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
