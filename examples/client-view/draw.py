#!/usr/bin/env python3
"""Draws what the client saw: one row a way, a mark for each reply, the longest silence as a bar. Reads DIR/WAY.json and
DIR/WAY.replies (see inner.sh); writes client-view.svg, client-view.md and client-view.json there, and prints the table."""
import json
import sys

WAYS = [
    ("copy", "stop, copy, start"),
    ("rsync", "rsync, freeze, rsync, restore"),
    ("lazy", "lazy-migrate"),
]
LEFT, WIDTH, ROW, TOP, BEFORE_S = 210, 760, 74, 58, 2.0


def read(folder, way):
    with open(f"{folder}/{way}.json") as file:
        told = json.load(file)
    with open(f"{folder}/{way}.replies") as file:
        replies = [tuple(map(int, line.split())) for line in file]
    times = [(at - told["began_ms"]) / 1000 for at, _ in replies]
    gaps = [(after - before, before, after) for before, after in zip(times, times[1:]) if after >= 0]
    told["gap"] = max(gaps)
    told["times"] = times
    told["whole_s"] = (told["ended_ms"] - told["began_ms"]) / 1000
    return told


def table(rows):
    lines = [
        "| way | longest silence for the client | requests lost | connections | until the client is served by B and all is done |",
        "|---|---|---|---|---|",
    ]
    for (_, title), row in rows:
        lines.append(f"| {title} | {row['gap'][0]:.2f} s | {row['lost']} | {row['connections']} | {row['whole_s']:.1f} s |")
    return "\n".join(lines) + "\n"


def picture(rows):
    longest = max(row["times"][-1] for _, row in rows)
    scale = WIDTH / (longest + BEFORE_S)
    x = lambda second: LEFT + (second + BEFORE_S) * scale
    height = TOP + ROW * len(rows) + 40
    first = rows[0][1]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 30}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="24" font-size="15">What a client sees of a migration: each mark is a reply '
        f'({first["mib"]} MiB on disk, link {first["link"]})</text>',
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{TOP - 14}" y2="{height - 34}" stroke="#888" stroke-dasharray="3 3"/>',
        f'<text x="{x(0) + 4:.1f}" y="{TOP - 6}" fill="#555">the command is typed</text>',
    ]
    for index, ((way, title), row) in enumerate(rows):
        middle = TOP + ROW * index + ROW / 2
        gap, begin, end = row["gap"]
        colour = "#0a7d3c" if way == "lazy" else "#b3261e"
        parts.append(f'<text x="12" y="{middle - 4:.1f}">{title}</text>')
        parts.append(f'<text x="12" y="{middle + 13:.1f}" fill="#555">{row["lost"]} lost, {row["connections"]} connection(s)</text>')
        parts.append(
            f'<rect x="{x(begin):.1f}" y="{middle - 14:.1f}" width="{max(1.0, gap * scale):.1f}" height="28" fill="{colour}" opacity="0.25"/>'
        )
        for at in row["times"]:
            if at >= -BEFORE_S:
                parts.append(
                    f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{middle - 10:.1f}" y2="{middle + 10:.1f}" stroke="#1f4e9c" stroke-width="1"/>'
                )
        parts.append(f'<text x="{x(begin):.1f}" y="{middle + 30:.1f}" fill="{colour}">{gap:.2f} s of silence</text>')
    step = next(step for step in (1, 2, 5, 10, 20, 60) if (longest / step) <= 12 or step == 60)
    second = 0
    while second <= longest:
        parts.append(f'<text x="{x(second):.1f}" y="{height - 14}" text-anchor="middle" fill="#555">{second} s</text>')
        second += step
    return "\n".join(parts + ["</svg>"]) + "\n"


def main():
    folder = sys.argv[1]
    rows = [(way, read(folder, way[0])) for way in WAYS]
    text = table(rows)
    with open(f"{folder}/client-view.md", "w") as file:
        file.write(text)
    with open(f"{folder}/client-view.svg", "w") as file:
        file.write(picture(rows))
    with open(f"{folder}/client-view.json", "w") as file:
        for _, row in rows:
            row.pop("times")
            row["gap_s"] = row.pop("gap")[0]
        json.dump([row for _, row in rows], file, indent=1)
    print(text, end="")


main()
