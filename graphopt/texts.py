"""Real long text that every machine has: CPython's own language reference."""

from __future__ import annotations


def reference_topics() -> dict[str, str]:
    """Return the topics of ``help()`` and their text, about 465,000 characters."""
    from pydoc_data.topics import topics

    return dict(topics)


def language_reference() -> str:
    """Return every topic, in the order in which CPython keeps them, as one text."""
    return "\n\n".join(text.strip() for text in reference_topics().values())
