"""Names on the bus."""

from __future__ import annotations

BUS_NAME = "org.vmbackupd1"
ROOT = "/org/vmbackupd1"
JOBS = f"{ROOT}/job"
MANAGER = f"{BUS_NAME}.Manager"
JOB = f"{BUS_NAME}.Job"
ERROR_PREFIX = f"{BUS_NAME}.Error."

ADDRESS_VARIABLE = "VMBACKUPD_BUS_ADDRESS"  # for the daemon and its clients; unset is the system bus


def job_path(job_id: str) -> str:
    """The object path of a job."""
    return f"{JOBS}/{job_id}"
