#!/usr/bin/env python3
"""Times what a factorisation can be made of: batched and single eigendecompositions and SVDs, fp64, LibTorch's.

    bench_eigh.py [--threads 2]

Needs: torch 2.10.
"""

import argparse
import time

import torch

HIDDEN = 576


def milliseconds(action, repeats=5):
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    print("complex, by frequency: eigh of K×K batched, in a loop; SVD of K×D batched, in a loop; ms")
    for frequencies, heads in ((4, 3), (32, 3), (32, 8)):
        weights = torch.randn(frequencies, heads, HIDDEN, dtype=torch.complex128)
        grams = weights @ weights.mH
        print(
            f"{frequencies} × {heads}:",
            f"{milliseconds(lambda: torch.linalg.eigh(grams)):.3f}",
            f"{milliseconds(lambda: [torch.linalg.eigh(gram) for gram in grams]):.3f}",
            f"{milliseconds(lambda: torch.linalg.svd(weights, full_matrices=False)):.3f}",
            f"{milliseconds(lambda: [torch.linalg.svd(w, full_matrices=False) for w in weights]):.3f}",
        )
    layers = torch.randn(8, 384, HIDDEN, dtype=torch.double)
    grams = layers @ layers.mT
    print("real, 384 rows, a layer: eigh batched over layers, in a loop, SVD; ms")
    print(
        f"{milliseconds(lambda: torch.linalg.eigh(grams), 2) / 8:.1f}",
        f"{milliseconds(lambda: [torch.linalg.eigh(gram) for gram in grams], 2) / 8:.1f}",
        f"{milliseconds(lambda: [torch.linalg.svd(w, full_matrices=False) for w in layers], 2) / 8:.1f}",
    )


if __name__ == "__main__":
    main()
