"""Counters of a running copy, readable from other threads, and the flag that stops it."""


cdef class Progress:
    def __init__(self, total=0):
        self.bytes_total = total

    def cancel(self):
        self.cancel_flag = 1

    @property
    def cancelled(self):
        return self.cancel_flag != 0

    def __repr__(self):
        return (
            f"Progress({self.bytes_done} of {self.bytes_total} bytes, {self.bytes_read} read, "
            f"{self.zero_bytes} zero{', cancelled' if self.cancel_flag else ''})"
        )
