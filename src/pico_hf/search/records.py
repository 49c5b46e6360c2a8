"""What an index keeps of an image beside its vectors: how a record changes."""

from __future__ import annotations

from typing import Any

from pico_hf.search.sources import SourceImage

Record = dict[str, Any]


def new_record(
    key: str, digest: str, image: SourceImage, before: Record | None, keep_payload: bool
) -> Record:
    """What an image's record becomes.

    Args:
        key: Its id.
        digest: Of its content.
        image: What is added.
        before: Its record, if there is one.
        keep_payload: True keeps the payload that is there.
    """
    paths = list(before["paths"]) if before is not None and before["digest"] == digest else []
    if image.path is not None and image.path not in paths:
        paths.append(image.path)
    payload = image.payload
    if payload is None or (keep_payload and before is not None):
        payload = {} if before is None else before["payload"]
    return {"id": key, "digest": digest, "paths": paths, "payload": payload}


def merged_record(base: Record | None, ours: Record | None, theirs: Record | None) -> Record | None:
    """What becomes of a record that two processes change at the same time.

    Args:
        base: Before both changes; None: it was not there.
        ours: What this process makes of it; None: it goes.
        theirs: What it has become meanwhile; None: it is gone.

    Returns:
        Paths that both have added, without those that either has taken away; None if none is left
        of an image that goes. Another content is a new record.

    Example:
        >>> ours = {"digest": "x", "paths": ["a", "b"], "payload": {}}
        >>> theirs = {"digest": "x", "paths": ["c"], "payload": {"n": 1}}
        >>> merged_record({"digest": "x", "paths": ["a"], "payload": {}}, ours, theirs)["paths"]
        ['c', 'b']
    """
    if theirs is None or (ours is not None and ours["digest"] != theirs["digest"]):
        return ours
    before = [] if base is None or base["digest"] != theirs["digest"] else base["paths"]
    wanted = [] if ours is None else ours["paths"]
    removed = set(before) - set(wanted)
    paths = [path for path in theirs["paths"] if path not in removed]
    paths += [path for path in wanted if path not in before and path not in paths]
    if ours is None:
        return {**theirs, "paths": paths} if paths else None
    changed = base is not None and ours["payload"] != base["payload"]
    return {**theirs, "paths": paths, "payload": (ours if changed else theirs)["payload"]}
