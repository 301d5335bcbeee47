"""A load on a database, through its own command-line client: numbered transactions, one after the other.

Runs in a guest with nothing but its Python's standard library. Each transaction adds the next row and counts it in
another table; when the server has acknowledged it, its number and the time are written down, on a tmpfs that no backup
holds.

    dbload.py ACKNOWLEDGED CLIENT...        until SIGTERM; the client reads SQL and prints rows
    dbload.py --check CLIENT...             prints what the tables hold as JSON
"""

import json
import subprocess
import sys
import time

SCHEMA = (
    "DROP TABLE IF EXISTS entry; DROP TABLE IF EXISTS tally; "
    "CREATE TABLE entry (n BIGINT PRIMARY KEY, pad TEXT NOT NULL); "
    "CREATE TABLE tally (one INT PRIMARY KEY, count BIGINT NOT NULL, sum BIGINT NOT NULL); "
    "INSERT INTO tally VALUES (1, 0, 0);"
)
PAUSE = 0.03  # seconds between transactions: an emulated CPU has other work too
PAD = "REPEAT(MD5('%s'), 16)"
CHECK = (
    "SELECT COUNT(*), COALESCE(MIN(n), 1), COALESCE(MAX(n), 0) FROM entry; SELECT count, sum FROM tally; "
    "SELECT COUNT(*) FROM entry WHERE pad <> REPEAT(MD5(CONCAT(n)), 16);"
)


def load(path: str, client: "list[str]") -> None:
    """Transactions from 1 on; ``path`` gets a line ``NUMBER TIME`` for each one that is acknowledged."""
    with subprocess.Popen(client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin and process.stdout
        process.stdin.write(SCHEMA + "\n")
        with open(path, "w", buffering=1) as acknowledged:
            number = 0
            while True:
                number += 1
                process.stdin.write(
                    f"BEGIN; INSERT INTO entry VALUES ({number}, {PAD % number}); "
                    f"UPDATE tally SET count = count + 1, sum = sum + {number}; COMMIT; SELECT {number};\n"
                )
                process.stdin.flush()
                answer = process.stdout.readline().strip()
                if answer != str(number):
                    sys.exit(f"transaction {number}: answered {answer!r}")
                acknowledged.write(f"{number} {time.time()}\n")
                time.sleep(PAUSE)


def check(client: "list[str]") -> None:
    """How many rows from where to where, what was counted of them, and how many are not as they were written."""
    done = subprocess.run(client, input=CHECK, stdout=subprocess.PIPE, text=True, check=True)
    rows, first, last, count, total, bad = (int(word) for word in done.stdout.replace("|", " ").split())
    print(json.dumps({"rows": rows, "first": first, "last": last, "count": count, "sum": total, "bad": bad}))


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(sys.argv[2:])
    else:
        load(sys.argv[1], sys.argv[2:])
