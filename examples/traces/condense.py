"""What nbdkit's log filter wrote, as a trace: lines of `<microseconds since the last line> <r|w> <block> <blocks>`, in blocks
of 4 KiB; first the source's, then the destination's; before them `disk <bytes>`, and `data <block> <blocks>` for all that is
not a hole, in MiB."""
import datetime
import os
import re
import sys

LINE = re.compile(r"(\d+-\d+-\d+ \d+:\d+:\d+\.\d+) .*\b(Read|Write) id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)")


def condense(path, writes_only):
    last = None
    for line in open(path):
        found = LINE.search(line)
        if not found or (writes_only and found[2] == "Read"):
            continue
        at = datetime.datetime.fromisoformat(found[1])
        offset, count = int(found[3], 16), int(found[4], 16)
        first = offset // 4096
        blocks = (offset + count + 4095) // 4096 - first
        gap = 0 if last is None else max(0, round((at - last).total_seconds() * 1e6))
        last = at
        print(gap, "r" if found[2] == "Read" else "w", first, blocks)


def data(path):
    """Runs of MiB in which there is data."""
    fd, size = os.open(path, os.O_RDONLY), os.stat(path).st_size
    print("disk", size)
    runs, at = [], 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        first, end = start >> 20, (at + (1 << 20) - 1) >> 20
        if runs and runs[-1][1] >= first:
            runs[-1][1] = end
        else:
            runs.append([first, end])
    for first, end in runs:
        print("data", first * 256, (end - first) * 256)


data(sys.argv[1])
print("source")
condense(sys.argv[2], True)
print("destination")
condense(sys.argv[3], False)
