"""Measure INT8 latency relative to FP32 in onnxruntime, OpenVINO and ExecuTorch; target 0.40.

    uv run python benchmarks/int8_latency.py [--networks NAME ...] [--batch-sizes B ...] [--threads N] [--rounds N]
        [--image-size S] [--round-to N] [--runtimes onnxruntime openvino executorch] [--whole] [--quick]

torchvision's resnet18, vgg11_bn and mobilenet_v2 and timm's tf_efficientnet_lite0 with ten classes, on random images of
64x64, each whole and with half the channels of every layer pruned, in FP32 and in INT8: prepared, calibrated on random
images and exported by the code of `kdpipe compress`, the same network for all runtimes; ExecuTorch only on demand. VGG
ends in global average pooling and one linear layer of 512 x 10, as for small images; torchvision's own head of 120
million weights is for 224x224. Weights are random with a seed, and batch norms have seen random images: the multiplied
numbers do not change the time.

All files take turns in one process, round by round. The table has the medians of both, the median of the ratio INT8 /
FP32 within a round, the range of nine of ten ratios, and the ratio of the fastest rounds. If the last two are far from
the third, the machine is busy. The target is for batch 16, for ResNet and VGG on a CPU with AVX512-VNNI; the others are
only reported. Below the table are the operators that INT8 leaves in float in onnxruntime.

cnn and resnet20 are kdpipe's own, for 32x32. --whole: nothing pruned. --quick: resnet18 alone and 5 rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.quantization.qat import calibrate, prepare_qat
from kdpipe.stages.evaluation.latency import Latency, measure_latency
from kdpipe.stages.export.executorch_program import export_executorch
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.onnx_session import float_nodes
from kdpipe.stages.export.openvino_ir import export_openvino
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.runtime.cpu import cpu_features, cpu_name, num_cores

TARGET, TARGET_BATCH_SIZE = 0.40, 16
TARGETED = ("resnet18", "vgg11_bn")
TIMM = ("tf_efficientnet_lite0",)
NETWORKS = (*TARGETED, "mobilenet_v2", *TIMM)
SMALL = ("cnn", "resnet20")
NUM_CLASSES = 10
RUNTIMES = ("onnxruntime", "openvino", "executorch")


def main() -> None:
    arguments = parse()
    print(f"CPU: {cpu_name()} ({', '.join(cpu_features()) or 'no known features'})")
    if "avx512_vnni" not in cpu_features():
        print("This CPU has no AVX512-VNNI: the targets do not apply.")
    runtimes = ", ".join(f"{name} {version(name)}" for name in arguments.runtimes)
    print(
        f"threads: {arguments.threads}, {runtimes}, images of {arguments.image_size}x"
        f"{arguments.image_size}, pruned to multiples of {arguments.round_to}, {arguments.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), arguments)
        times = measure_latency(
            files, None, arguments.batch_sizes, num_rounds=arguments.rounds, num_threads=arguments.threads
        )
        names = [name.removesuffix(" fp32") for name in files if name.endswith(" fp32")]
        for batch_size in arguments.batch_sizes:
            print_table(names, times, batch_size)
        print("\nstill float in the INT8 files:")
        for name in names:
            if name.endswith("onnxruntime"):
                print(f"  {name:<34} {float_operators(files[f'{name} int8'])}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=(*NETWORKS, *SMALL))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[TARGET_BATCH_SIZE], metavar="B")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--round-to", type=int, default=PruneConfig().round_to)
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES[:2]), choices=RUNTIMES)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.networks, arguments.rounds = ["resnet18"], 5
    return arguments


def write_files(folder: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """Write the files; return them by name: "resnet18 onnxruntime fp32", "resnet18 pruned openvino int8"."""
    files = {}
    for name in arguments.networks:
        for variant, model in variants(name, arguments):
            for kind, made in (("fp32", model), ("int8", quantized(model, arguments.image_size))):
                path = folder / f"{variant} {kind}.onnx"
                export_onnx(made, example(arguments.image_size), path, metadata={})
                for runtime in arguments.runtimes:
                    files[f"{variant} {runtime} {kind}"] = path
                    if runtime == "openvino":
                        export_openvino(path, path.with_suffix(".xml"))
                        files[f"{variant} {runtime} {kind}"] = path.with_suffix(".xml")
                    elif runtime == "executorch":
                        export_executorch(made, example(arguments.image_size), path.with_suffix(".pte"))
                        files[f"{variant} {runtime} {kind}"] = path.with_suffix(".pte")
    return files


def variants(name: str, arguments: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    image_size, model = arguments.image_size, network(name, arguments.image_size)
    with torch.no_grad():
        for seed in range(3):
            model.train()(images(image_size, seed))
    model.eval()
    yield name, model
    if not arguments.whole:
        pruned = prune(model, example(image_size), PruneConfig(ratio=0.5, round_to=arguments.round_to))
        yield f"{name} pruned", pruned.model


def network(name: str, image_size: int) -> nn.Module:
    """Build torchvision's, timm's or kdpipe's network with ten classes and random weights."""
    torch.manual_seed(0)
    if name in SMALL:
        size = (image_size, image_size)
        return build_model(ModelConfig(name=name), num_classes=NUM_CLASSES, in_channels=3, image_size=size, seed=0)
    if name in TIMM:
        import timm

        return timm.create_model(name, num_classes=NUM_CLASSES)
    model: nn.Module = torchvision.models.get_model(name, num_classes=NUM_CLASSES)
    if isinstance(model, torchvision.models.VGG):
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, NUM_CLASSES)
    return model


def quantized(model: nn.Module, image_size: int) -> nn.Module:
    prepared = prepare_qat(model, example(image_size))
    calibrate(prepared, [images(image_size, seed) for seed in range(3)])
    return prepared.eval()


def images(image_size: int, seed: int) -> Tensor:
    """Return a batch of noise [32, 3, S, S]."""
    return torch.randn(32, 3, image_size, image_size, generator=torch.Generator().manual_seed(seed))


def example(image_size: int) -> Tensor:
    return torch.zeros(2, 3, image_size, image_size)


def print_table(names: Sequence[str], times: Mapping[str, Mapping[int, Latency]], batch_size: int) -> None:
    heads = f"{'FP32 ms':>9} {'INT8 ms':>9} {'INT8/FP32':>10} {'90 % within':>15} {'fastest':>8}  target"
    print(f"\nbatch {batch_size:<30} {heads}")
    for name in names:
        fp32, int8 = (times[f"{name} {kind}"][batch_size].rounds_ms for kind in ("fp32", "int8"))
        ratios = [int8_ms / fp32_ms for int8_ms, fp32_ms in zip(int8, fp32, strict=True)]
        ratio = statistics.median(ratios)
        low, high = np.percentile(ratios, (5, 95))
        print(
            f"  {name:<34} {statistics.median(fp32):9.2f} {statistics.median(int8):9.2f} {ratio:10.3f} "
            f"{low:7.3f}-{high:<7.3f} {min(int8) / min(fp32):8.3f}  {target_met(name, batch_size, ratio)}"
        )


def target_met(name: str, batch_size: int, ratio: float) -> str:
    if batch_size != TARGET_BATCH_SIZE or not name.startswith(TARGETED):
        return "none"
    return f"{TARGET:.2f} {'met' if ratio <= TARGET else 'missed'}"


def float_operators(path: Path) -> str:
    counts: Mapping[str, int] = Counter(node.op_type for node in float_nodes(path))
    return ", ".join(f"{count} {op_type}" for op_type, count in sorted(counts.items())) or "nothing"


if __name__ == "__main__":
    main()
