#!/usr/bin/env python3
"""Writes the small Parquet files under tests/data/text/ with pyarrow.

Run from anywhere with a Python that has `pyarrow`; not run in CI:
    python3 scripts/make_parquet_fixtures.py
"""
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "data" / "text"


def write(name, table, **options):
    pq.write_table(table, OUT / name, **options)
    print(name, (OUT / name).stat().st_size, "bytes")


def main():
    rows = [f"document {i}: " + "é🙂 text\n" * (i % 4) for i in range(10)] + ["", "last"]
    n = len(rows)
    strings = pa.table({
        "id": pa.array(range(n), pa.int64()),
        "text": pa.array(rows, pa.string()),
        "large": pa.array(rows, pa.large_string()),
        "dictionary": pa.array(rows[:3] * 4, pa.string()).dictionary_encode(),
        "binary": pa.array([r.encode() for r in rows], pa.binary()),
        "nulls": pa.array([None if i == 6 else r for i, r in enumerate(rows)], pa.string()),
        "list": pa.array([[r, r] for r in rows], pa.list_(pa.string())),
        "struct": pa.array([{"field": r} for r in rows], pa.struct([("field", pa.string())])),
    })
    # Row groups of 5, 5 and 2.
    write("strings_snappy.parquet", strings, compression="snappy", row_group_size=5)
    write("strings_zstd.parquet", strings, compression="zstd", row_group_size=5, use_dictionary=False,
          data_page_version="2.0", write_page_checksum=True)

    wiki = (ROOT / "data" / "wikitext-2" / "wiki.test.raw").read_bytes()[:6000]
    lines = wiki[:wiki.rindex(b"\n") + 1].decode().splitlines(keepends=True)
    write("wikitext_rows.parquet", pa.table({"text": [line if line.strip() else "" for line in lines]}), compression="zstd",
          row_group_size=4)

    sentences = pa.table({"sentence": ["a first sentence <unk>", "no it was n't black monday", "N years old"]})
    write("ptb_sentences.parquet", sentences, compression="snappy")

    # A row that is not what its type says.
    data = b"fine" + b"caf\xe9 x"
    offsets = pa.array([0, 4, len(data)], pa.int32()).buffers()[1]
    bad = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(data))
    write("not_utf8.parquet", pa.table({"text": bad}), compression="snappy")


if __name__ == "__main__":
    main()
