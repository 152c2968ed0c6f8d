"""Make deliveries.csv beside this file: 600 deliveries of a courier, by the rule below.

    python examples/table/make_data.py

minutes  =  10 + 5 · distance_km + 1.5 · weight_kg + 14 · (weather is rain) + 28 · (weather is snow)
            + 6 · (vehicle is bicycle) + noise, uniform from -5 to 5
late     =  "yes" where minutes > 45, else "no"

A twentieth of the distances, and a tenth of the weathers, are then left empty: late still depends on them.
"""

from __future__ import annotations

import random
from pathlib import Path

COLUMNS = ("distance_km", "weight_kg", "weather", "vehicle", "late")
ROWS = 600


def make_row(rng: random.Random) -> tuple[str, ...]:
    distance = round(0.5 + 7.5 * rng.random(), 2)
    weight = round(0.2 + 9.8 * rng.random() ** 2, 1)
    weather = ("dry", "dry", "dry", "rain", "rain", "snow")[int(6 * rng.random())]
    vehicle = ("bicycle", "scooter", "van")[int(3 * rng.random())]
    minutes = 10 + 5 * distance + 1.5 * weight + {"dry": 0, "rain": 14, "snow": 28}[weather]
    minutes += (6 if vehicle == "bicycle" else 0) + 10 * rng.random() - 5
    late = "yes" if minutes > 45 else "no"
    distance_cell = "" if rng.random() < 0.05 else f"{distance}"
    weather_cell = "" if rng.random() < 0.1 else weather
    return distance_cell, f"{weight}", weather_cell, vehicle, late


def make_text() -> str:
    """The whole file."""
    rng = random.Random(0)  # random() alone gives the same numbers on every version of Python
    rows = [make_row(rng) for _ in range(ROWS)]
    return "".join(",".join(row) + "\n" for row in [COLUMNS, *rows])


if __name__ == "__main__":
    path = Path(__file__).resolve().parent / "deliveries.csv"
    path.write_text(make_text(), encoding="utf-8", newline="\n")
    print(f"{ROWS} rows in {path}")
