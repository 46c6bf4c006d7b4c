"""A Penstock application on two Ray nodes whose control store outlives its process: it can be killed and come back."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping

import psutil
from fakes.serve_cluster import ServeCluster
from fakes.two_node_ray import command


class DurableRay(ServeCluster):
    """`kill_gcs` and `start_gcs` as a power cut and a restart of the process would; its store is on disk."""

    def __init__(self) -> None:
        self._restarted: subprocess.Popen[bytes] | None = None
        super().__init__()

    def store(self) -> Mapping[str, str]:
        """The embedded store, in the cluster's folder, and the patience that KubeRay gives to nodes (there 600 s)."""
        store = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.folder / "gcs")}
        return {**store, "RAY_gcs_rpc_server_reconnect_timeout_s": "180"}

    def kill_gcs(self) -> None:
        """SIGKILL the store's process. `ray start` would end the node for it, so it is stopped first, for good."""
        (process,) = [each for each in self.processes("gcs_server") if "gcs_server" in command(each)[0]]
        self._command, self._gcs_environment = process.cmdline(), process.environ()
        os.kill(self.head.pid, signal.SIGSTOP)
        process.kill()
        psutil.wait_procs([process], timeout=5)

    def start_gcs(self) -> None:
        """The same process again: same port, same store."""
        with (self.folder / "gcs.log").open("ab") as log:
            self._restarted = subprocess.Popen(
                self._command, env=self._gcs_environment, stdout=log, stderr=log, start_new_session=True
            )

    def end(self) -> None:
        """End everything, the restarted process last."""
        os.kill(self.head.pid, signal.SIGCONT)
        try:
            super().end()
        finally:
            if self._restarted is not None:
                self._restarted.kill()
                self._restarted.wait(5)
