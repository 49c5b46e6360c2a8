"""Scripts with the real Hub client, in processes of their own: it reads its settings at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hub_server import Hub


def run_client(
    hub: Hub,
    script: str,
    folder: Path,
    *arguments: str,
    home: str = "home",
    timeout: float = 110,
    **env: str,
) -> str:
    """Runs a script in a fresh process that knows no Hub but this one.

    Args:
        hub: The loopback server.
        script: Python code.
        folder: Working folder of the process.
        arguments: The script's `sys.argv[1:]`.
        home: Folder of the client's cache, inside `folder`.
        timeout: Seconds.
        env: More environment variables.

    Returns:
        What the script prints.
    """
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "writer",
        "HF_HOME": str(folder / home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **settings, **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
