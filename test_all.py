# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pytest"]
# ///
"""Tests of the five chapters: `pytest test_all.py`, about six minutes on two CPU cores.

The chain runs as a user runs it, on toy, with both networks, while the other tests compare the pieces with oracles:
counts of the authors' instantiated networks, PyTorch's own layers and counters, closed forms, brute force.
SEED=1 pytest test_all.py takes another seed.
"""
import ast
import contextlib
import csv
import gc
import importlib.util
import io
import itertools
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent
CHAPTERS = ["01_dynamic_net", "02_teacher_trades", "03_progressive_rslad", "04_predictor", "05_nsga2"]
SEED = int(os.environ.get("SEED", 0))
os.environ["OMP_NUM_THREADS"] = "1"  # two chains on two cores: one thread each is fastest
torch.set_num_threads(1)


def chapter(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


c1, c2, c3, c4, c5 = map(chapter, CHAPTERS)
NETS = [c1.make_net(*key, 10) for key in c1.NETWORKS]
TINY = [c1.make_net(name, "tiny", 10) for name in ("resnet50", "mbv3")]
both = pytest.mark.parametrize("net", TINY, ids=["resnet50", "mbv3"])

# What the authors' released networks count when instantiated:
# net, classes, depths, width indices or kernels, expansion indices, parameters, MACs
ARCHITECTURES = """
resnet50 10 22222 222222 222222222222222222 46077482 2358013952
resnet50 10 00000 000000 000000000000000000 5223570 285232096
resnet50 10 20212 121102 120012100121210110 20245570 872585216
resnet50 10 20022 100110 021211112211210212 17123938 792604640
resnet50 10 22010 210010 101211011201021100 9052442 588903392
resnet50 10 00121 211211 122201221002020210 17033722 949980176
resnet50 10 00120 102022 211211221111212012 20582226 1081971712
resnet50 10 20100 222021 002211122001210112 11743978 710558736
resnet50 10 22201 220101 202022202220200110 12711434 816110608
resnet50 10 21212 101221 202201121212100122 25209442 1329493008
resnet50 10 21011 201012 202012220210202022 24188890 946172928
resnet50 10 00201 020021 020222111010221011 14029794 730040336
mbv3 10 44444 77777777777777777777 22222222222222222222 6396570 179706624
mbv3 10 22222 33333333333333333333 00000000000000000000 2142602 35293824
mbv3 10 24224 53773337353353357335 01201110101211211110 3264682 59594240
mbv3 10 33334 75377535577375733575 10111200201220002002 3989354 83900928
mbv3 10 22434 53357533577735735573 21010221212222011010 3793466 84813440
mbv3 10 22443 37353737337573555737 20222212212112112220 4723978 95715584
mbv3 10 24344 73733533537377335535 11212121010012001201 4230314 87391488
mbv3 10 24323 75775553733753735773 01111221220202021222 4080082 79417344
mbv3 10 22434 53733573773377777737 22112022020102112000 3717858 82090240
mbv3 10 44342 57737353733775355555 12220220112011011102 3112874 108481664
mbv3 10 43233 73333537757577735733 11102211201121020022 3465490 81872384
mbv3 10 42444 75755357753775537377 11200112122010122012 4585138 108849792
resnet50 100 22222 222222 222222222222222222 46261892 2358198272
resnet50 100 00000 000000 000000000000000000 5343180 285351616
resnet50 100 00200 100200 100201220210201202 9691884 707006144
resnet50 100 22020 221120 202212112002020002 13303316 1095747264
resnet50 100 02222 102002 102122000000222102 27588828 1109185536
resnet50 100 00201 001012 220101110012110020 19179948 776452096
resnet50 100 02212 011110 020000110021112110 14123980 803982016
resnet50 100 20012 022022 101002101200220021 27575436 1037875200
resnet50 100 02000 011000 122122012100100212 8218412 657390272
resnet50 100 00112 022011 220202211210001111 17211212 883035296
resnet50 100 00111 112001 111212021111122011 13683100 654918816
resnet50 100 22122 221221 112111112222122201 28315700 1544337568
mbv3 100 44444 77777777777777777777 22222222222222222222 6511860 179821824
mbv3 100 22222 33333333333333333333 00000000000000000000 2257892 35409024
mbv3 100 22222 73535337753755755573 20101222021022021012 2844420 60099584
mbv3 100 32433 73355573537555375337 21201222222120112012 3588652 89561856
mbv3 100 24223 75773375337775777753 21022200110221201212 3672500 74096384
mbv3 100 32234 37575355337757573353 22010100022002021211 4177588 80994944
mbv3 100 22224 75377377753355555537 20020210112012102010 3628356 66207616
mbv3 100 34233 35357375755535357577 22011212210111222221 4578604 95339008
mbv3 100 42233 77753553375375353753 02112000101100110110 3137932 81430016
mbv3 100 42442 33535755537333375355 10000010101201020211 3565852 79299712
mbv3 100 22232 53555573777737555777 10122100122101100101 2834004 58499840
mbv3 100 24223 73377553735553735553 20000222000121002110 3486572 72378752
"""


# ---- Fixtures: the chain, and a folder of images ---------------------------------------------------------------------
@pytest.fixture(scope="session", autouse=True)
def chains(request, tmp_path_factory):
    """Both chains, started at once; chains(net) waits for one and returns its folder and what it printed."""
    if not any({"chains", "chain", "judged"} & set(item._fixtureinfo.argnames) for item in request.session.items):
        return (yield)
    root = tmp_path_factory.mktemp("chain")
    run(root, "01_dynamic_net", "--dataset", "toy", "--seed", SEED)  # both read its images
    processes = {name: subprocess.Popen(
        [sys.executable, HERE / "05_nsga2.py", "--dataset", "toy", "--net", name, "--seed", str(SEED)], cwd=root,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for name in ("resnet50", "mbv3")}
    printed = {}

    def wait(name):
        if name not in printed:
            printed[name] = processes[name].communicate()[0]
        assert processes[name].returncode == 0, printed[name]
        return root / f"runs/toy-{name}", printed[name]
    yield wait
    for process in processes.values():
        process.kill()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of three classes: 60 training and 15 test images each, of different sizes, dark, middling and bright."""
    from torchvision.utils import save_image
    root, generator = tmp_path_factory.mktemp("images") / "shades", torch.Generator().manual_seed(0)
    for part, count in (("train", 60), ("test", 15)):
        for i, name in enumerate(("bright", "dark", "middling")):
            (root / part / name).mkdir(parents=True)
            for n in range(count):
                noise = 0.2 * torch.rand(3, 32 + n % 3, 40, generator=generator)
                save_image(noise + (0.8, 0.0, 0.4)[i], root / part / name / f"{n}.png")
    return root


SMALL = ["--batch-size", 32, "--val-images", 10, "--calibration-images", 60, "--epochs"]  # for that folder


def run(root, name, *words, code=0):
    """Run a chapter's main() in the folder root; what it prints if it succeeds, else its one line on stderr."""
    out, err, before, argv = io.StringIO(), io.StringIO(), os.getcwd(), sys.argv
    os.chdir(root)
    sys.argv = [f"{name}.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            sys.modules[name].run_chapter(sys.modules[name].main)
        exited = 0
    except SystemExit as stop:
        exited = stop.code or 0
    finally:
        sys.argv = argv
        os.chdir(before)
    assert exited == code, out.getvalue() + err.getvalue()
    assert err.getvalue().count("\n") == (1 if code else 0), err.getvalue()
    return err.getvalue().strip() if code else out.getvalue()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights_of(net, seed=SEED, dtype=torch.float64):
    """Random shared weights; kernel transforms and batch-norm weights too, so that a mistake in them shows."""
    torch.manual_seed(seed)
    shared = {name: weight.to(dtype) for name, weight in c1.init_weights(net).items()}
    for name, weight in shared.items():
        if "bn" in name or ".to" in name:
            weight += 0.1 * torch.randn_like(weight)
    return shared


def students_of(net, count, seed=SEED):
    rng = random.Random(seed)
    return [c1.student_at(net, -1), c1.student_at(net, 0), *(c1.sample(net, rng) for _ in range(count))]


def standalone(net, shared, student):
    """An ordinary network of the student's sizes holding copies of its slice, batch norm in training mode."""
    blocks = c1.blocks_of(net, student)
    stats = {layer.name: (torch.zeros(layer.out), torch.ones(layer.out)) for layer in c1.layers(blocks)}
    weights = {name: weight.detach() for name, weight in c1.slice_weights(shared, blocks).items()}
    plain = c1.Standalone(blocks, weights, stats).to(next(iter(shared.values())).dtype)
    plain.load_state_dict(plain.state_dict() | weights)  # again, now in full precision
    return plain


# ---- The shape of the project ----------------------------------------------------------------------------------------
def test_chapters_are_self_contained_and_share_only_equal_text():
    seen, shared = {}, 0
    for name in CHAPTERS:
        text = (HERE / f"{name}.py").read_text()
        tree = ast.parse(text)
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert all(m.split(".")[0] in {*sys.stdlib_module_names, "torch", "torchvision", "numpy"} for m in modules)
        for node in tree.body:
            names = [node.name] if hasattr(node, "name") else [
                target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
            for own in set(names) - {"main", "STAGE"}:
                source = ast.get_source_segment(text, node)
                assert seen.setdefault(own, source) == source, f"{own} differs in {name}"
                shared += seen[own] is not source
    assert shared > 50


# ---- Chapter 1: the dynamic network ----------------------------------------------------------------------------------
@pytest.mark.parametrize("line", ARCHITECTURES.split("\n")[1:-1])
def test_counts_of_the_released_networks(line):
    name, classes, depths, others, expands, params, macs = line.split()
    net = c1.make_net(name, "paper", int(classes))
    others = [net.genes["width_1"][int(i)] for i in others] if name == "resnet50" else list(map(int, others))
    student = (*map(int, depths), *others, *(net.genes["expand_1_1"][int(i)] for i in expands))
    assert c1.cost(net, c1.canonical(net, student)) == (int(params), int(macs))


@pytest.mark.parametrize("net", NETS, ids=["-".join(key) for key in c1.NETWORKS])
def test_counts_agree_with_pytorch(net):
    for student in {*students_of(net, 2)}:
        plain = standalone(net, weights_of(net, dtype=torch.float32), student).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain(torch.zeros(1, 3, 32, 32))
        params, macs = c1.cost(net, student)
        assert counter.get_total_flops() == 2 * macs
        assert sum(p.numel() for p in plain.parameters()) == params


def test_students_are_counted_exactly():
    for net in TINY:  # all genotypes, one by one
        assert len({c1.canonical(net, s) for s in itertools.product(*net.genes.values())}) == c1.count_students(net)
    assert c1.count_students(c1.make_net("mbv3", "paper", 10)) == (9 ** 2 + 9 ** 3 + 9 ** 4) ** 5
    resnet = 2 * 3 ** 6 * (3 ** 2 + 3 ** 3 + 3 ** 4) ** 3 * (3 ** 4 + 3 ** 5 + 3 ** 6)
    assert c1.count_students(c1.make_net("resnet50", "paper", 10)) == resnet


@both
def test_inactive_genes_make_no_difference(net):
    small = c1.student_at(net, 0)
    assert 0 in small and c1.canonical(net, small) == small
    switched_off = [max(choices) if gene == 0 and 0 not in choices else gene
                    for gene, choices in zip(small, net.genes.values())]
    assert switched_off != list(small) and c1.canonical(net, tuple(switched_off)) == small
    varied = [i for i, name in enumerate(net.genes) if name.split("_")[0] in ("width", "kernel")]
    for student in (c1.sample(net, random.Random(i), ("width", "kernel")) for i in range(20)):
        assert all(gene == top for i, (gene, top) in enumerate(zip(student, c1.student_at(net, -1))) if i not in varied)


@both
def test_slice_computes_what_a_standalone_network_computes(net):
    shared = {name: weight.requires_grad_() for name, weight in weights_of(net).items()}
    for student in students_of(net, 3):
        plain = standalone(net, shared, student).train()
        x = torch.rand(5, 3, 32, 32, dtype=torch.float64)
        weights = c1.slice_weights(shared, c1.blocks_of(net, student))
        logits, expected = c1.forward(weights, c1.blocks_of(net, student), x), plain(x)
        torch.testing.assert_close(logits, expected)
        direction = torch.randn_like(logits)
        ours = torch.autograd.grad((logits * direction).sum(), list(weights.values()))
        theirs = torch.autograd.grad((expected * direction).sum(), [plain.get_parameter(name) for name in weights])
        torch.testing.assert_close(ours, theirs)


@both
def test_gradient_of_shared_weights_is_the_sum_over_students_and_zero_outside(net):
    shared = {name: weight.requires_grad_() for name, weight in weights_of(net).items()}
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)

    def gradients(students):
        loss = sum(c3.forward(c3.slice_weights(shared, c3.blocks_of(net, s)), c3.blocks_of(net, s), x).square().sum()
                   for s in students)
        grads = torch.autograd.grad(loss, list(shared.values()), allow_unused=True)
        return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(shared.items(), grads)}
    small, other = students_of(net, 1)[1:]
    one, two, both_of_them = gradients([small]), gradients([other]), gradients([small, other])
    for name in shared:
        torch.testing.assert_close(both_of_them[name], one[name] + two[name])
    layers = {layer.name: layer for layer in c3.layers(c3.blocks_of(net, small))}
    outside = 0
    for name, weight in shared.items():
        if name.endswith("conv.weight"):
            layer, gradient = layers.get(name.split(".")[0]), one[name].clone()
            if layer:
                assert gradient[:layer.out, :layer.inp].abs().max() > 0
                gradient[:layer.out, :layer.inp // layer.groups] = 0
            assert not gradient.any()
            outside += gradient.numel()
    assert outside


def test_a_smaller_kernel_is_the_transformed_centre_of_the_next_larger():
    net = c1.make_net("mbv3", "paper", 10)
    shared = weights_of(net)
    names = list(net.genes)
    for kernel in (5, 3):
        student = list(c1.student_at(net, -1))
        student[names.index("kernel_2_2")] = kernel
        ours = c1.slice_weights(shared, c1.blocks_of(net, tuple(student)))["2_2_middle.conv.weight"]
        for channel in (0, 100):
            expected = shared["2_2_middle.conv.weight"][channel, 0]
            for k in range(5, kernel - 1, -2):
                centre = expected[1:-1, 1:-1].flatten()
                matrix = shared[f"2_2_middle.to{k}"]
                expected = torch.stack([sum(centre[i] * matrix[i, j] for i in range(k * k)) for j in range(k * k)])
                expected = expected.view(k, k)
            torch.testing.assert_close(ours[channel, 0], expected)
    identity = c1.slice_weights(c1.init_weights(net), c1.blocks_of(net, tuple(student)))  # untrained: just the centre
    assert identity["2_2_middle.conv.weight"].shape[2:] == (3, 3)


class PreActivation(nn.Module):
    """A block of WideResNet, written the usual way."""
    def __init__(self, inp, out, stride):
        super().__init__()
        self.norm, self.first = nn.BatchNorm2d(inp), nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn, self.last = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = None if inp == out else nn.Conv2d(inp, out, 1, stride, bias=False)

    def forward(self, x):
        active = F.relu(self.norm(x))
        return self.last(F.relu(self.bn(self.first(active)))) + (self.shortcut(active) if self.shortcut else x)


def usual_wide_resnet(depth, width, stem_stride):
    sizes, blocks = [16, 16 * width, 32 * width, 64 * width], []
    for s, (inp, out) in enumerate(zip(sizes, sizes[1:])):
        blocks += [PreActivation(inp if b == 0 else out, out, 2 if b == 0 and s else 1) for b in range((depth - 4) // 6)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, stem_stride, 1, bias=False), *blocks, nn.BatchNorm2d(sizes[-1]), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], 10))


def test_wide_resnet_is_the_usual_one():
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        usual_wide_resnet(34, 10, 1).eval()(torch.zeros(1, 3, 32, 32))
    assert c1.cost(c1.make_net("wrn34_10", "paper", 10), ()) == (46_160_474, counter.get_total_flops() // 2)
    net = c1.make_net("wrn34_10", "tiny", 10)
    shared, usual = weights_of(net), usual_wide_resnet(10, 2, 2).double().train()
    assert net.genes == {} and c1.count_students(net) == 1 and c1.sample(net, random.Random(0)) == ()
    state = list(usual.state_dict())
    ours = {"stem": "0", "norm": "4", "classifier": "8"} | {f"{s}_1_{part}": f"{s}.{part}" for s in (1, 2, 3)
                                                          for part in ("norm", "first", "last", "shortcut")}
    for name, weight in shared.items():
        layer, part = name.split(".", 1)
        place = ours[layer] if "_first" not in name or "conv" in part else ours[layer].replace("first", "bn")
        target = usual.state_dict()[f"{place}.{part.split('.')[1]}"]
        state.remove(f"{place}.{part.split('.')[1]}")
        target.copy_(weight.view(target.shape))
    assert all("running" in name or "tracked" in name for name in state)
    x = torch.rand(5, 3, 32, 32, dtype=torch.float64)
    blocks = c2.blocks_of(net, ())
    torch.testing.assert_close(c2.forward(c2.slice_weights(shared, blocks), blocks, x), usual(x))


def test_a_student_from_words():
    net = c1.make_net("resnet50", "paper", 10)
    fixed = dict(zip(net.genes, c2.student_from(net, "w=1.0 d=1 e=0.25")))
    assert fixed["depth_stem"] == 0 and fixed["depth_2"] == 1 and fixed["width_mid"] == 1.0  # a stem is 0 or 2 deep
    assert {fixed[f"expand_3_{b}"] for b in range(1, 6)} == {0.25} and fixed["expand_3_6"] == 0
    resnet50 = c2.student_from(net, "w=1.0 e=0.25 d=1 depth_2=2 depth_3=2")
    stem = sum(len(layer.tail) * layer.out + 9 * layer.inp * layer.out for layer in c1.layers(c1.blocks_of(net, resnet50)[:2]))
    usual = sum(weight.numel() for name, weight in torchvision.models.resnet50(num_classes=10).named_parameters()
                if name.split(".")[0] not in ("conv1", "bn1"))  # the stem is another one
    assert c1.cost(net, resnet50)[0] - stem == usual
    assert c2.student_from(net, "") == c1.student_at(net, -1)
    named = dict(zip(net.genes, c2.student_from(net, "w=0.65 width_2=0.8 expand_2_1=0.2")))
    assert [named[f"width_{s}"] for s in (1, 2, 3)] == [0.65, 0.8, 0.65] and named["expand_2_1"] == 0.2 != named["expand_2_2"]


# ---- Chapters 2 and 3: losses, attack, judgement ---------------------------------------------------------------------
@both
def test_sorting_channels_leaves_the_largest_network_unchanged(net):
    shared = weights_of(net)
    blocks, x = c3.blocks_of(net, c3.student_at(net, -1)), torch.rand(4, 3, 32, 32, dtype=torch.float64)
    before = c3.forward(c3.slice_weights(shared, blocks), blocks, x)
    old = {name: weight.clone() for name, weight in shared.items()}
    c3.sort_channels(shared, net)
    torch.testing.assert_close(c3.forward(c3.slice_weights(shared, blocks), blocks, x), before)
    moved = [name for name in shared if not torch.equal(old[name], shared[name])]
    assert any("reduce" in name for name in moved) and not any("stem" in name or "class" in name for name in moved)
    for block in blocks:
        if len(block.main) == 3:
            norms = shared[f"{block.main[-1].name}.conv.weight"].abs().sum((0, 2, 3))
            assert (norms.diff() <= 0).all()


def test_pgd_on_a_linear_model_is_the_closed_form():
    torch.manual_seed(SEED)
    direction = torch.randn(3, 8, 8, dtype=torch.float64)
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    for module in (c2, c3, c4):
        x_adv = module.pgd(lambda x: (x * direction).sum((1, 2, 3)), x, lambda out: out.sum(), torch.zeros_like(x),
                           0.1, 0.03, 10)
        torch.testing.assert_close(x_adv, (x + 0.1 * direction.sign()).clamp(0, 1))


def test_pgd_stays_in_the_ball_and_climbs_a_convex_loss():
    torch.manual_seed(SEED)
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    centre = torch.rand_like(x)
    losses = []
    for steps in range(8):
        x_adv = c2.pgd(lambda x: (x - centre).square().sum((1, 2, 3)), x, lambda out: out.sum(),
                       0.5 * torch.randn_like(x) if steps == 7 else torch.zeros_like(x), 0.05, 0.02, steps)
        assert steps == 0 or (x_adv - x).abs().max() <= 0.05 + 1e-12
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        losses.append((x_adv - centre).square().sum((1, 2, 3)))
    for weaker, stronger in zip(losses[:6], losses[1:7]):
        assert (stronger >= weaker - 1e-12).all()
    assert (losses[6] > losses[0]).all()


# The textbook version: what chapters 2 and 3 do, as it is written first, for oracles and for --bench. Channels first, a
# slice in every forward pass, gradients of everything in every step of the attack, and a DataLoader with workers.
def textbook(shared, blocks):
    """A student with fresh slices and batch statistics: logits = f(x)."""
    def layer_output(layer, x):
        weight = shared[f"{layer.name}.conv.weight"][:layer.out, :layer.inp // layer.groups]
        while weight.shape[-1] > layer.kernel:
            k = weight.shape[-1] - 2
            weight = (weight[:, :, 1:-1, 1:-1].flatten(1) @ shared[f"{layer.name}.to{k}"]).view(-1, 1, k, k)
        bias = shared[f"{layer.name}.conv.bias"][:layer.out] if layer.tail == c1.BIAS else None
        x = F.conv2d(x, weight, bias, layer.stride, layer.kernel // 2, groups=layer.groups)
        if layer.tail == c3.BN:
            scale, shift = (shared[f"{layer.name}.{part}"][:layer.out] for part in c3.BN)
            x = F.batch_norm(x, None, None, scale, shift, training=True)
        return c3.ACTIVATIONS[layer.act](x)
    return lambda x: c3.walk(blocks, x, layer_output)


def textbook_kl(target, logits):
    """KL(target || softmax(logits)), mean over images; target holds probabilities."""
    return (target * (target.log() - logits.log_softmax(1))).sum() / len(target)


def textbook_attack(predict, x, target, args):
    """PGD on the KL, written as in the papers; draws the same start as the chapters."""
    x_adv = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
    for _ in range(args.steps):
        x_adv = x_adv.clone().requires_grad_()
        textbook_kl(target.detach(), predict(x_adv)).backward()
        delta = x_adv.detach() + args.step_size / 255 * x_adv.grad.sign() - x
        x_adv = (x + delta.clamp(-args.eps / 255, args.eps / 255)).clamp(0, 1)
    return x_adv


def textbook_losses(shared, blocks, x, target, args):
    """RSLAD, equation 2: (loss, natural KL, adversarial KL); target holds the teacher's probabilities."""
    predict = textbook(shared, blocks)
    x_adv = textbook_attack(predict, x, target, args)
    for weight in shared.values():
        weight.grad = None
    natural, adversarial = textbook_kl(target, predict(x)), textbook_kl(target, predict(x_adv))
    return (1 - args.alpha) * natural + args.alpha * adversarial, natural, adversarial


class TextbookImages(torch.utils.data.Dataset):
    """Images cropped and flipped one by one, as a DataLoader's workers do it."""

    def __init__(self, images):
        from torchvision.transforms import v2
        self.images = images
        self.transform = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]) / 255


@both
@pytest.mark.parametrize("method", ["trades", "rslad"])
def test_losses_and_gradients_are_the_formulas(net, method):
    shared = {name: weight.requires_grad_() for name, weight in weights_of(net).items()}
    student = students_of(net, 1)[-1]
    blocks = c2.blocks_of(net, student)
    predict = textbook(shared, blocks)
    args = SimpleNamespace(eps=8.0, step_size=2.0, steps=3, beta=6.0, alpha=5 / 6)
    x, y = torch.rand(6, 3, 32, 32, dtype=torch.float64), torch.randint(10, (6,))
    target = torch.randn(6, 10, dtype=torch.float64).softmax(1)
    torch.manual_seed(1)
    weights = c2.slice_weights(shared, blocks)
    ours, first, second = (c2.trades_loss(weights, blocks, x, y, args) if method == "trades" else
                           c3.rslad_loss(weights, blocks, x, target.log(), args))
    gradient = torch.autograd.grad(ours, list(shared.values()), allow_unused=True)
    torch.manual_seed(1)
    if method == "trades":
        x_adv = textbook_attack(predict, x, predict(x).softmax(1), args)
        natural = predict(x).softmax(1)
        terms = -natural[range(6), y].log().mean(), textbook_kl(natural, predict(x_adv))
        theirs = terms[0] + 6 * terms[1]
    else:
        theirs, *terms = textbook_losses(shared, blocks, x, target, args)
    torch.testing.assert_close((ours, first, second), (theirs, *terms))
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, list(shared.values()), allow_unused=True))


def test_a_saturated_softmax_gives_finite_gradients():
    logits = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    loss = c2.kl(logits.flip(1), logits.log_softmax(1))
    assert loss.item() == 1000
    loss.backward()
    assert logits.grad.isfinite().all() and logits.grad.any()


@both
def test_calibration_is_pytorchs_cumulative_batch_norm(net):
    images = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8)
    shared, student = weights_of(net, dtype=torch.float32), students_of(net, 1)[-1]
    plain = standalone(net, shared, student).train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # PyTorch's cumulative average
    for batch in (20, 60):
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        with torch.no_grad():
            for x in images.split(batch):
                plain(x / 255)
        predict = c4.calibrated(shared, net, student, images, batch=batch)
        for name, (mean, var) in predict.keywords["stats"].items():
            norm = plain.get_submodule(f"{name}.bn")
            torch.testing.assert_close((mean, var), (norm.running_mean, norm.running_var), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(predict(images[:7] / 255), plain.eval()(images[:7] / 255), rtol=1e-3, atol=1e-4)
        plain.train()


def test_robust_accuracy_counts_images_right_before_and_after_the_attack():
    torch.manual_seed(SEED)
    images, labels = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8), torch.randint(3, (40,))
    matrix = 0.05 * torch.randn(3 * 32 * 32, 3)

    def predict(x):
        return x.flatten(1) @ matrix
    natural, robust = c4.judge(predict, images, labels, 2 / 255, 0.5 / 255, 20)
    margins = predict(images / 255)
    assert torch.equal(natural, margins.argmax(1) == labels)
    assert natural.any() and not natural.all() and not (robust & ~natural).any() and 0 < robust.sum() < natural.sum()
    for batch in (7, 13):
        assert torch.equal(c4.judge(predict, images, labels, 2 / 255, 0.5 / 255, 20, batch)[1], robust)
    weak = [c4.judge(predict, images, labels, 0.5, 0.1 / 255, 2, batch)[1] for batch in (7, 13, 40)]
    assert torch.equal(weak[0], weak[1]) and torch.equal(weak[0], weak[2])  # two tiny steps: the start decides
    # For a linear model the exact answer is known, but for the clipping to [0, 1], which only helps the defence.
    for i in range(40):
        if natural[i] and not robust[i]:
            drop = [2 / 255 * (matrix[:, j] - matrix[:, labels[i]]).abs().sum() for j in range(3)]
            assert any(margins[i, j] + drop[j] >= margins[i, labels[i]] for j in range(3) if j != labels[i])
    fgsm = c4.judge(predict, images, labels, 2 / 255, 2 / 255, 1)[1]
    assert robust.sum() <= fgsm.sum() <= natural.sum()


def test_no_tensor_is_kept_from_student_to_student():
    shared = {name: weight.requires_grad_() for name, weight in weights_of(TINY[1], dtype=torch.float32).items()}
    args, alive = SimpleNamespace(eps=8.0, step_size=2.0, steps=2, alpha=5 / 6), []
    x, target = torch.rand(2, 3, 32, 32), torch.zeros(2, 10).log_softmax(1)
    for i in range(60):
        blocks = c3.blocks_of(TINY[1], c3.sample(TINY[1], random.Random(i)))
        c3.rslad_loss(c3.slice_weights(shared, blocks), blocks, x, target, args)[0].backward()
        for weight in shared.values():
            weight.grad = None
        alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert len(set(alive[5:])) == 1


@both
def test_bf16_is_for_convolutions_alone(net):
    shared = {name: weight.requires_grad_() for name, weight in weights_of(net, dtype=torch.float32).items()}
    blocks, x = c3.blocks_of(net, students_of(net, 1)[-1]), torch.rand(16, 3, 32, 32)
    weights, full = c3.slice_weights(shared, blocks, torch.bfloat16), c3.slice_weights(shared, blocks)
    assert all(weight.dtype == (torch.bfloat16 if ".conv." in name else torch.float32)
               for name, weight in weights.items())
    logits, expected = c3.forward(weights, blocks, x), c3.forward(full, blocks, x)
    assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
    error = (logits - expected).square().mean() / expected.var()
    assert error < 0.01
    logits.square().sum().backward()
    assert all(weight.grad is None or weight.grad.dtype == torch.float32 for weight in shared.values())
    args = SimpleNamespace(precision=None, settings={}, device=torch.device("cuda"), common={"net": "mbv3"}, preset="tiny")
    assert c3.conv_dtype(args) == torch.bfloat16 and args.settings == {"precision": "bf16"}
    args = SimpleNamespace(**vars(args) | {"precision": None, "device": torch.device("cpu")})
    assert c3.conv_dtype(args) == torch.float32 and args.precision == "fp32"  # small networks gain nothing on a CPU


def test_augmentation_is_a_crop_and_a_flip_of_each_image_its_own():
    torch.manual_seed(SEED)
    images = torch.randint(1, 256, (30, 3, 32, 32), dtype=torch.uint8)
    places = []
    for image, ours in zip(F.pad(images, (4, 4, 4, 4)), c2.augment(images)):
        found = [(y, x, flip) for y in range(9) for x in range(9) for flip in (False, True) if torch.equal(
            (image[:, y:y + 32, x:x + 32].flip(2) if flip else image[:, y:y + 32, x:x + 32]) / 255, ours)]
        assert len(found) == 1
        places += found
    assert len(set(places)) > 20 and len({flip for *_, flip in places}) == 2


def test_toy_is_not_for_linear_classifiers():
    images, labels, names = c1.toy_images(3000, SEED)
    assert torch.equal(images, c1.toy_images(3000, SEED)[0])
    assert not torch.equal(images, c1.toy_images(3000, SEED + 1)[0])
    assert images.shape == (3000, 3, 32, 32) and labels.unique().tolist() == list(range(len(names)))
    x = torch.cat([images.flatten(1) / 255, torch.ones(3000, 1)], 1)
    train, test = x[:2400], x[2400:]
    dual = torch.linalg.solve(train @ train.T + 10 * torch.eye(2400), F.one_hot(labels[:2400]).float())  # ridge
    answer = (test @ (train.T @ dual)).argmax(1)
    assert (answer == labels[2400:]).float().mean() < 0.4  # the tiny networks reach more than 0.9


# ---- Chapter 4: the predictor ----------------------------------------------------------------------------------------
@both
def test_features_are_one_hot_and_empty_where_a_gene_is_off(net):
    students = students_of(net, 20)
    for student, features in zip(students, c4.one_hot(net, students)):
        at = 0
        for gene, choices in zip(student, net.genes.values()):
            assert features[at:at + len(choices)].tolist() == [float(gene == choice) for choice in choices]
            at += len(choices)
        assert at == len(features)


@both
def test_the_predictor_recovers_an_additive_function(net):
    students = c4.draw_students(net, 600, SEED)
    assert len(set(students)) == 600
    torch.manual_seed(SEED)
    effect = torch.randn(c4.one_hot(net, students).shape[1], 2) * torch.tensor([0.01, 0.02])
    labels = c4.one_hot(net, students) @ effect + torch.tensor([0.8, 0.4])
    args = SimpleNamespace(net=net, seed=SEED, epochs=30, predictor_lr=1e-3, hidden_layers=3, hidden_width=100)
    predictor = c4.train_predictor(args, students[:500], labels[:500])
    error = c4.predict_accuracy(predictor, net, students[500:]) - labels[500:]
    assert (error.square().mean(0).sqrt() < 0.25 * labels.std(0)).all()


def test_kendalls_tau_is_that_of_all_pairs():
    rng = np.random.default_rng(SEED)
    measured, predicted = rng.integers(0, 8, (30, 2)) / 8, rng.integers(0, 12, (30, 2)) / 12  # with ties
    rows = c4.report(torch.tensor(measured), torch.tensor(measured), torch.tensor(predicted))
    for column, row in enumerate(rows):
        a, b = measured[:, column], predicted[:, column]
        right = wrong = tied_a = tied_b = 0
        for i, j in itertools.combinations(range(30), 2):
            right += (a[i] - a[j]) * (b[i] - b[j]) > 0
            wrong += (a[i] - a[j]) * (b[i] - b[j]) < 0
            tied_a += a[i] == a[j]
            tied_b += b[i] == b[j]
        pairs = 30 * 29 / 2
        assert abs(row["tau"] - (right - wrong) / ((pairs - tied_a) * (pairs - tied_b)) ** 0.5) < 1e-6


def test_the_reported_noise_is_that_of_measuring_on_other_images():
    generator = torch.Generator().manual_seed(SEED)
    chance = 0.4 + 0.2 * torch.rand(3000, 2, generator=generator)  # of each student to be right
    right = torch.rand(3000, 2, 200, generator=generator) < chance[..., None]
    labels, halves = right.float().mean(2), right[:, :, :100].float().mean(2)
    again = (torch.rand(3000, 2, 200, generator=generator) < chance[..., None]).float().mean(2)
    for i, row in enumerate(c4.report(labels, halves, labels[-300:] + 0.01)):
        assert abs(row["RMSE"] - 0.01) < 1e-6
        measured = (labels - again)[:, i].square().mean().sqrt().item()
        assert abs(row["moves on other images"] / measured - 1) < 0.1


# ---- Chapter 5: NSGA-II ----------------------------------------------------------------------------------------------
def beats(a, b, violation_a=0.0, violation_b=0.0):
    if violation_a != violation_b:
        return violation_a < violation_b
    return all(x >= y for x, y in zip(a, b)) and any(x > y for x, y in zip(a, b))


def test_non_dominated_sorting_agrees_with_brute_force():
    rng = np.random.default_rng(SEED)
    for _ in range(20):
        points = rng.integers(0, 6, (40, 2)).astype(float)  # many ties
        violation = rng.choice([0.0, 0.0, 1.0, 2.0], 40)
        rank = c5.non_dominated_sort(c5.dominance(points, violation))
        left, expected, level = set(range(40)), {}, 0
        while left:
            front = {i for i in left if not any(beats(points[j], points[i], violation[j], violation[i]) for j in left)}
            expected |= dict.fromkeys(front, level)
            left, level = left - front, level + 1
        assert [expected[i] for i in range(40)] == rank.tolist()
        feasible = rank[violation == 0]
        assert not len(feasible) or feasible.max() < rank[violation > 0].min(initial=99)


def test_crowding_distance_by_hand():
    points = np.array([[0.0, 10.0], [1.0, 6.0], [4.0, 5.0], [10.0, 0.0]])
    assert c5.crowding_distance(points).tolist() == [np.inf, 0.4 + 0.5, 0.9 + 0.6, np.inf]
    assert c5.crowding_distance(np.array([[3.0, 3.0], [0.0, 0.0], [1.0, 1.0]])).tolist() == [np.inf, np.inf, 2]
    assert c5.crowding_distance(np.ones((3, 2))).tolist()[1] == 0
    order = c5.best_first(np.array([[1.0, 6.0], [0.0, 10.0], [0.0, 0.0], [4.0, 5.0], [10.0, 0.0]]), np.zeros(5))
    assert set(order[:2]) == {1, 4} and order[2:].tolist() == [3, 0, 2]


def test_a_child_takes_its_genes_from_its_parents():
    net, rng = TINY[0], random.Random(SEED)
    mother, father = c5.student_at(net, -1), c5.student_at(net, 0)
    for _ in range(50):
        child = c5.breed(net, mother, father, 0.0, rng)
        assert c5.canonical(net, child) == child
        for gene, m, f, choices in zip(child, mother, father, net.genes.values()):
            assert gene in (m, f) or f == 0 and gene in choices
    mutants = [c5.breed(net, mother, mother, 0.1, rng) for _ in range(400)]
    changed = np.mean([gene != m for child in mutants for gene, m in zip(child[:3], mother)])
    assert 0.03 < changed < 0.07  # a tenth is drawn anew, of two choices one is the old


@pytest.mark.parametrize("net", NETS, ids=["-".join(key) for key in c1.NETWORKS])
def test_the_searchs_macs_are_the_counted_ones(net):
    macs_of = c5.macs_counter(net)
    assert all(macs_of(student) == c1.cost(net, student)[1] for student in students_of(net, 200))


def test_nsga2_reaches_the_true_front_and_keeps_the_budget():
    net, rng = TINY[1], np.random.default_rng(SEED)  # 1,764 students: all can be looked at
    everyone = sorted({c5.canonical(net, s) for s in itertools.product(*net.genes.values())})
    effect = rng.normal(size=(c5.one_hot(net, everyone).shape[1], 2))
    effect[:, 1] -= 2 * effect[:, 0]  # what is good for one objective is mostly bad for the other

    def evaluate(students):
        macs = np.array([c1.cost(net, student)[1] / 1e6 for student in students])
        return c5.one_hot(net, students).numpy() @ effect, (macs - 1.1).clip(min=0)
    objectives, violation = evaluate(everyone)
    true = [i for i in range(len(everyone)) if violation[i] == 0 and not any(
        violation[j] == 0 and beats(objectives[j], objectives[i]) for j in range(len(everyone)))]
    assert len(true) > 5
    first, (students, found, exceeded) = c5.nsga2(net, evaluate, 60, 60, 0.1, SEED)
    assert len(set(students)) == len(students) == 60 and all(c5.canonical(net, s) == s for s in students)
    front = {s for s, rank in zip(students, c5.non_dominated_sort(c5.dominance(found, exceeded))) if rank == 0}
    assert (exceeded[:len(front)] == 0).all()
    assert front == {everyone[i] for i in true}
    assert set(first[0]) != set(students) and len(set(first[0]) & front) < len(front)  # it was not there from the start

    def tightest(students):  # the smallest student's budget: it is the one answer
        return evaluate(students)[0], np.array([c1.cost(net, student)[1] - 624128 for student in students]).clip(0)
    assert c5.nsga2(net, tightest, 20, 3, 0.1, SEED)[1][0][0] == c5.student_at(net, 0)


# ---- The chain -------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["resnet50", "mbv3"])
def chain(request, chains):
    return request.param, *chains(request.param)


def test_the_chain_runs_and_each_stage_says_what_comes_next(chain):
    name, out, printed = chain
    names = {"01_dynamic_net.pt", "01_students.csv", "02_teacher.pt", "02_teacher_log.csv", "03_progressive.pt",
             "03_progressive_log.csv", "04_students.csv", "04_students.pt", "04_predictions.csv", "04_predictor.pt",
             "04_report.csv", "04_widths.csv", "04_pictures.png", "05_population.csv", "05_front.csv", "05_best.csv",
             "05_search.pt", "05_student.pt2", "02_table1.csv", "02_teacher_log.svg", "03_progressive_log.svg",
             "04_students.svg", "04_widths.svg", "04_predictions.svg", "05_population.svg"}
    assert {path.name for path in out.iterdir()} == names | {".lock"}
    for script in CHAPTERS[2:]:
        assert f"next: python {script}.py" in printed
    assert "left" in printed and "Traceback" not in printed and "Warning" not in printed
    for script in CHAPTERS:  # finished stages say so and do nothing
        before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        assert "earlier" in run(out.parent.parent, script, "--dataset", "toy", "--net", name, "--seed", SEED)
        assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_the_teacher_and_the_students_are_robust(chain):
    name, out, _ = chain
    net = c1.make_net(name, "tiny", 10)
    teacher = torch.load(out / "02_teacher.pt", weights_only=True)
    log = rows_of(out / "02_teacher_log.csv")
    assert len(log) == 5 and float(log[-1]["loss"]) < float(log[0]["loss"])
    assert teacher["robust"] == max(float(row["robust"]) for row in log)
    assert teacher["natural"] > teacher["robust"] > 0.25  # chance is 0.1
    log = rows_of(out / "03_progressive_log.csv")
    assert len(log) == 6 and float(log[-1]["robust_smallest"]) > float(log[1]["robust_smallest"])
    students = rows_of(out / "04_students.csv")
    assert len(students) == 40 and [*students[0]] == [*net.genes, *c4.MEASURED]
    for column, floor in (("natural", 0.3), ("robust", 0.2)):
        assert np.mean([float(row[column]) for row in students]) > floor
    assert all(float(row["robust"]) <= float(row["natural"]) for row in students)
    assert len(rows_of(out / "04_predictions.csv")) == 10


def test_the_search_keeps_its_budget_and_judges_for_real(chain):
    name, out, _ = chain
    net = c1.make_net(name, "tiny", 10)
    teacher, largest, judged = rows_of(out / "02_table1.csv")
    best, = rows_of(out / "05_best.csv")
    assert [row["method"] for row in (teacher, largest, judged)] == ["TRADES", "ProARD", "ProARD"]
    assert teacher["params"] == largest["params"]
    assert [teacher[name] for name in ("natural", "fgsm", "pgd20")] != [
        largest[name] for name in ("natural", "fgsm", "pgd20")]  # of other weights
    assert int(best["macs"]) <= 1e6 * float(best["max_macs"]) < int(largest["macs"])
    student = tuple(next(choice for choice in (0, *choices) if choice == float(best[gene]))
                    for gene, choices in net.genes.items())
    assert c1.cost(net, student) == (int(judged["params"]), int(judged["macs"])) and judged["macs"] == best["macs"]
    assert float(judged["natural"]) > float(judged["fgsm"]) >= float(judged["pgd20"]) - 0.02 > 0.1
    assert best["student"] == judged["student"] and best in [
        {"student": best["student"], "seconds": best["seconds"], **row} for row in rows_of(out / "05_front.csv")]
    assert {row["generation"] for row in rows_of(out / "05_population.csv")} == {"first", "last"}


def test_the_exported_student_needs_none_of_this_code(chain, tmp_path):
    name, out, _ = chain
    data = torch.load(out.parent.parent / f"data/toy-{SEED}.pt", weights_only=True)
    torch.save((data["test"] / 255, data["test_labels"]), tmp_path / "test.pt")
    code = ("import torch; student = torch.export.load('student.pt2').module(); x, y = torch.load('test.pt');"
            "print((student(x).argmax(1) == y).float().mean().item(), student(x[:1]).shape[1])")
    shutil.copy(out / "05_student.pt2", tmp_path / "student.pt2")
    accuracy, classes = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, text=True,
                                       stdout=subprocess.PIPE).stdout.split()
    assert abs(float(accuracy) - float(rows_of(out / "02_table1.csv")[2]["natural"])) < 0.005 and classes == "10"


def test_a_folder_of_images(images, tmp_path):
    run(tmp_path, "01_dynamic_net", "--dataset", images, "--preset", "tiny")
    data = torch.load(next((tmp_path / "data").glob("shades-*.pt")), weights_only=True)
    assert data["classes"] == 3 and [len(data[part]) for part in ("train", "held_out", "test")] == [162, 18, 45]
    means = [data["test"][data["test_labels"] == label].float().mean() for label in range(3)]
    assert means[0] > means[2] > means[1]  # bright, dark, middling: the folders in alphabetical order


# ---- Baselines, table 1, figures -------------------------------------------------------------------------------------
def test_baselines_make_table_1_and_the_costs(images, finished, tmp_path):
    """TRADES and RSLAD of one student, by our teacher and by a WideResNet, beside what the chain has left."""
    shutil.copytree(finished[0] / "run", tmp_path / "run", ignore=shutil.ignore_patterns(".lock", "*.svg"))
    os.symlink(finished[0] / "data", tmp_path / "data")
    common, student = ["--dataset", images, "--preset", "tiny"], ["--student", "w=1.0 d=1 e=0.25"]
    chosen, fixed = ["--out", "run"], ["--sampling", "fixed"]
    trades, rslad = QUICK["02_teacher_trades"], QUICK["03_progressive_rslad"]
    run(tmp_path, "02_teacher_trades", *common, *chosen, *trades, *student)
    run(tmp_path, "02_teacher_trades", *common, *trades, "--net", "wrn34_10", "--out", "wide")
    run(tmp_path, "03_progressive_rslad", *common, *chosen, *rslad, *fixed, *student)
    run(tmp_path, "03_progressive_rslad", *common, *chosen, *rslad, *fixed, *student, "--teacher", "wide")
    for name in ("02_teacher_state.pt", "03_progressive_state.pt"):  # runs in progress, which are not judged
        shutil.copy(finished[0] / "stopped" / name, tmp_path / "run" / name.replace("progressive", "fixed_d1"))
    (tmp_path / "run/03_fixed_d1_log.csv").write_text("epoch,loss,seconds\n1,0.5,1000\n2,nan,2000\n")
    run(tmp_path, "02_teacher_trades", *common, *chosen, "--judge")
    rows = rows_of(tmp_path / "run/02_table1.csv")
    assert [(row["method"], row["student"]) for row in rows] == [
        ("TRADES", "largest"), ("TRADES", student[1]), ("RSLAD", f"{student[1]} by teacher"),
        ("RSLAD", f"{student[1]} by wide"), ("ProARD", "largest"), ("ProARD", "best of 2.3M")]
    net = c1.make_net("resnet50", "tiny", 3)
    one = c2.student_from(net, student[1])
    assert {(int(row["params"]), int(row["macs"])) for row in rows[1:4]} == {c1.cost(net, one)}
    start, ours, wide = (torch.load(tmp_path / f"run/{name}.pt", weights_only=True)["weights"] for name in (
        "01_dynamic_net", "03_fixed_w1.0d1e0.25", "03_fixed_w1.0d1e0.25_wide"))
    inside = {layer.name: layer for layer in c1.layers(c1.blocks_of(net, one))}
    for name, weight in start.items():  # from random weights on; outside the student nothing has been learnt
        layer = inside.get(name.split(".")[0])
        if layer is None:
            assert torch.equal(weight, ours[name])
        elif name.endswith("conv.weight"):
            ratio = ours[name] / weight
            assert ratio[:layer.out, :layer.inp].std() > 1e-3
            ratio[:layer.out, :layer.inp] = 0.99
            assert ((0.98 < ratio) & (ratio < 1)).all()  # weight decay
    assert any(not torch.equal(ours[name], wide[name]) for name in ours)  # another teacher
    run(tmp_path, "03_progressive_rslad", *common, *chosen, *rslad, *fixed, *student, "--without", "sorting", code=2)
    data = torch.load(next((tmp_path / "data").glob("*.pt")), weights_only=True)
    predict = c4.calibrated(wide, net, one, data["train"][:500])
    with torch.no_grad():
        natural = (predict(data["test"] / 255).argmax(1) == data["test_labels"]).float().mean().item()
    assert abs(natural - float(rows[3]["natural"])) < 1e-6
    printed = run(tmp_path, "05_nsga2", *common, *chosen, "--figures")
    seconds = {name: [float(row["seconds"]) for row in rows_of(tmp_path / f"run/{name}.csv")] for name in (
        "03_fixed_w1.0d1e0.25_log", "03_fixed_w1.0d1e0.25_wide_log", "03_progressive_log", "04_students", "05_best")}
    retraining = 50 * (seconds["03_fixed_w1.0d1e0.25_log"][-1] + seconds["03_fixed_w1.0d1e0.25_wide_log"][-1]) / 2
    dynamic = seconds["03_progressive_log"][-1] + sum(seconds["04_students"]) + 50 * seconds["05_best"][0]
    last = rows_of(tmp_path / "run/05_cost.csv")[-1]
    assert last["devices"] == "50" and abs(float(last["retraining"]) - retraining / 3600) < 1e-9
    assert abs(float(last["ProARD"]) - dynamic / 3600) < 1e-9
    assert f"{retraining / dynamic:.3g} times less than retraining (paper: 60)" in printed
    drawn = {path.stem for path in (tmp_path / "run").glob("*.svg")}
    assert drawn == {"02_teacher_log", "02_w1.0d1e0.25_log", "03_fixed_w1.0d1e0.25_log", "03_fixed_w1.0d1e0.25_wide_log",
                     "03_progressive_log", "04_students", "04_widths", "04_predictions", "05_population", "05_cost"}
    (tmp_path / "run/05_student_9M.pt2").write_text("of another budget")
    run(tmp_path, "05_nsga2", *common, *chosen, *QUICK["05_nsga2"], "--max-macs", 1.9, "--restart")
    assert [path.name for path in (tmp_path / "run").glob("*.pt2")] == ["05_student.pt2"]
    edit_row(tmp_path / "run/04_students.csv", 3, "natural", "high")
    assert "04_students.csv cannot be drawn" in run(tmp_path, "05_nsga2", *common, *chosen, "--figures", code=2)
    resave(students={"other": (1, 2, 3)})(tmp_path / "run/02_teacher.pt")
    assert "02_teacher.pt: other is not a student" in run(tmp_path, "02_teacher_trades", *common, *chosen, "--judge", code=2)


def test_without_the_teachers_weights_students_start_from_random_ones(images, finished, tmp_path):
    os.symlink(finished[0] / "data", tmp_path / "data")
    words = ["--dataset", images, "--preset", "tiny", "--sampling", "random", "--lr", 1e-9, *QUICK["03_progressive_rslad"]]
    found = []
    for i, without in enumerate(([], ["start", "sorting"], ["sorting"])):
        out = tmp_path / f"run{i}"
        out.mkdir()
        for name in ("01_dynamic_net.pt", "02_teacher.pt"):
            shutil.copy(finished[0] / "run" / name, out)
        run(tmp_path, "03_progressive_rslad", *words, "--out", out.name, *(["--without", *without] if without else []))
        found.append(torch.load(out / "03_random.pt", weights_only=True)["weights"])
    expected = [torch.load(finished[0] / "run" / name, weights_only=True)["weights"] for name in (
        "02_teacher.pt", "01_dynamic_net.pt", "02_teacher.pt")]
    c3.sort_channels(expected[0], c1.make_net("resnet50", "tiny", 3))
    for ours, theirs in zip(found, expected):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)


def test_a_plot_shows_every_point_in_its_place(tmp_path):
    xs, ys = [0.0, 3.0, 10.0], [20.0, 30.0, 25.0]
    c5.plot(tmp_path / "plot.svg", "a caption", [("a & b", "x in m", "y in s", {
        "dots": ("dots", xs, ys), "line": ("line", xs, ys), "level": ("level", [], [22.0])})])
    root = ET.parse(tmp_path / "plot.svg").getroot()
    shapes = {kind: [part.attrib for part in root if part.tag.endswith(kind)] for kind in ("circle", "polyline", "text")}
    words = [part.text for part in root if part.tag.endswith("text")]
    assert {"a & b", "x in m", "y in s", "dots", "line", "level", "a caption"} <= set(words)
    ticks = {"x": {}, "y": {}}  # value -> pixel, from the labels of the axes
    for word, place in zip(words, shapes["text"]):
        if word.replace(".", "").isdigit():
            ticks["y" if place["text-anchor"] == "end" else "x"][float(word)] = float(
                place["y"]) - 4 if place["text-anchor"] == "end" else float(place["x"])
    assert min(ticks["x"]) <= 0 and max(ticks["x"]) >= 10 and min(ticks["y"]) <= 20 and max(ticks["y"]) >= 30
    for x, y, circle in zip(xs, ys, shapes["circle"]):
        for value, axis, pixel in ((x, "x", circle["cx"]), (y, "y", circle["cy"])):
            expected = np.interp(value, sorted(ticks[axis]), [ticks[axis][tick] for tick in sorted(ticks[axis])])
            assert abs(float(pixel) - expected) < 0.2
    assert len(shapes["circle"]) == 4 and len(shapes["polyline"]) == 4  # with the legend's
    line = [tuple(map(float, point.split(","))) for point in shapes["polyline"][0]["points"].split()]
    assert line == [(float(circle["cx"]), float(circle["cy"])) for circle in shapes["circle"][:3]]
    heights = {point.split(",")[1] for point in shapes["polyline"][2]["points"].split()}
    assert len(heights) == 1 and min(y for _, y in line) < float(*heights) < max(y for _, y in line)


# ---- Stops: killed at any moment, the same command ends with the same files ------------------------------------------
QUICK = {  # every chapter in seconds, on the folder of three classes
    "01_dynamic_net": [],
    "02_teacher_trades": [*SMALL, 3],
    "03_progressive_rslad": [*SMALL, 2, "--val-every", 1],
    "04_predictor": ["--students", 12, "--test-students", 4, "--images", 18, "--steps", 4, "--calibration-images", 60],
    "05_nsga2": ["--population", 10, "--generations", 3],
}


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """A folder with a finished run/ and its data/, a stopped/ run with states to continue from, and {chapter: seconds}."""
    root, seconds = tmp_path_factory.mktemp("finished"), {}
    before = {path: path.stat().st_mtime_ns for path in images.rglob("*")}
    for script, words in QUICK.items():
        start = time.perf_counter()
        run(root, script, "--dataset", images, "--preset", "tiny", "--out", "run", *words)
        seconds[script] = time.perf_counter() - start
    assert {path.name for path in root.iterdir()} == {"run", "data"}  # nothing is written elsewhere
    assert {path: path.stat().st_mtime_ns for path in images.rglob("*")} == before
    shutil.copytree(root / "run", root / "stopped")
    with pytest.MonkeyPatch.context() as patched:
        for module, script in ((c2, "02_teacher_trades"), (c3, "03_progressive_rslad")):
            def stop(meter, part, images, say):
                meter.done += 1
                if meter.done == 8:
                    raise KeyboardInterrupt
            patched.setattr(module.Meter, "lap", stop)
            words = [*QUICK[script], "--save-every", 1e-9, "--out", "half"]
            shutil.copytree(root / "run", root / "half", ignore=shutil.ignore_patterns(f"{script[:2]}*"))
            run(root, script, "--dataset", images, "--preset", "tiny", *words, code=130)
            state, = (root / "half").glob("*_state.pt")
            shutil.move(state, root / "stopped" / state.name)
            shutil.rmtree(root / "half")
    return root, seconds


def contents(folder):
    """{file: what it holds} of a folder of runs, all but seconds."""
    def plain(content):
        if isinstance(content, dict):
            return {key: plain(value) for key, value in content.items() if key != "seconds"}
        return content.tolist() if torch.is_tensor(content) else content
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".csv":
            found[path.name] = [plain(row) for row in rows_of(path)]
        elif path.suffix == ".pt":
            found[path.name] = plain(torch.load(path, weights_only=True))
        elif path.suffix == ".pt2":
            found[path.name] = torch.export.load(path).module()(torch.linspace(0, 1, 3072).view(1, 3, 32, 32)).tolist()
        elif path.name != ".lock":
            found[path.name] = None
    return found


def test_killed_at_any_moment(images, finished, tmp_path):
    """KILLS=6 pytest test_all.py -s -k killed stops every chapter six times."""
    common, rng, kills, (root, seconds) = ["--dataset", images, "--preset", "tiny"], random.Random(SEED), 0, finished
    for script, words in QUICK.items():
        words = [*map(str, [*common, *words]), "--out", "killed", "--data-dir", "data_killed"]
        words += ["--save-every", "1e-4"] if "--batch-size" in words else []
        for _ in range(int(os.environ.get("KILLS", 1))):
            process = subprocess.Popen([sys.executable, "-u", HERE / f"{script}.py", *words], cwd=tmp_path, text=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            process.stdout.readline()
            time.sleep(rng.uniform(0, seconds[script]))
            process.send_signal(sent := rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            error = process.communicate()[1]
            assert process.returncode in (0, -sent, 130 if sent == signal.SIGINT else 0), error  # -2: while it was ending
            kills += process.returncode != 0
            assert (f"stopped; continue with: python {HERE / script}.py --dataset" in error) == (process.returncode == 130)
        run(tmp_path, script, *words)
    assert contents(root / "run") == contents(tmp_path / "killed")
    assert contents(root / "data") == contents(tmp_path / "data_killed")
    print(kills, "kills")


@pytest.mark.parametrize("script", ["02_teacher_trades", "03_progressive_rslad"])
def test_a_run_that_is_stopped_inside_an_epoch(images, finished, tmp_path, script):
    root = finished[0]
    shutil.copytree(root / "stopped", tmp_path / "run", ignore=lambda _, names: [
        name for name in names if name[0] == "0" and (name[:2] >= script[:2] or "table1" in name)
        and not name.endswith("_state.pt")])
    os.symlink(root / "data", tmp_path / "data")
    words = ["--dataset", images, "--preset", "tiny", "--out", "run", *QUICK[script]]
    assert "after iteration 7" in run(tmp_path, script, *words)  # the eighth was not saved
    found, expected = contents(tmp_path / "run"), contents(root / "run")
    made = [name for name in expected if name[:2] == script[:2] and name[-3:] in (".pt", "csv") and "table1" not in name]
    assert len(made) == 2 and all(found[name] == expected[name] for name in made)
    assert not list((tmp_path / "run").glob(f"{script[:2]}*_state.pt"))


def test_another_seed_gives_other_files(images, finished, tmp_path):
    os.symlink(finished[0] / "data", tmp_path / "data")
    for script in CHAPTERS[:2]:
        run(tmp_path, script, "--dataset", images, "--preset", "tiny", "--out", "run", "--seed", 1, *QUICK[script])
    found, expected = contents(tmp_path / "run"), contents(finished[0] / "run")
    for name in found:  # beyond the seed in the settings
        ours, other = ((content if name.endswith(".csv") else content["weights"])
                       for content in (found[name], expected[name]))
        assert ours != other, name


def test_two_runs_in_one_folder(images, tmp_path):
    words = ["--dataset", images, "--preset", "tiny", *SMALL, 100]
    process = subprocess.Popen([sys.executable, "-u", HERE / "02_teacher_trades.py", *map(str, words), "--out", "runs"],
                               cwd=tmp_path, stdout=subprocess.PIPE)
    while b"iterations" not in process.stdout.readline():
        assert process.poll() is None
    before = {path.name for path in (tmp_path / "runs").iterdir()}
    message = run(tmp_path, "02_teacher_trades", *words, "--out", "runs", "--restart", code=2)
    assert f"runs is in use by process {process.pid}: " in message
    assert before <= {path.name for path in (tmp_path / "runs").iterdir()}
    process.kill()
    process.communicate()
    c2.lock(SimpleNamespace(locks={}, restart=False), tmp_path / "runs")  # a dead process does not keep it


def test_a_full_disk_leaves_the_checkpoint_before(images, tmp_path):
    words = ["--dataset", images, "--preset", "tiny", *SMALL, 3, "--out", "runs", "--save-every", 1e-9]
    run(tmp_path, "01_dynamic_net", *words[:4], "--out", "runs")
    state, written = tmp_path / "runs/02_teacher_state.pt", []

    def limited(path, content):
        written.append(path)
        if len(written) == 4:  # a real limit of this process on the size of files
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            written.append(state.read_bytes())
        write(path, content)
    write, c2.write = c2.write, limited
    try:
        message = run(tmp_path, "02_teacher_trades", *words, code=2)
    finally:
        c2.write = write
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert message.startswith("02_teacher_trades.py: ") and "could not be written: File too large" in message
    assert state.read_bytes() == written[-1] and not list((tmp_path / "runs").glob("*.tmp"))


def test_bench_says_where_the_time_goes_and_writes_nothing(images, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for script, parts in (("02_teacher_trades", ["data", "attack", "loss and backward", "optimizer"]),
                          ("03_progressive_rslad", ["data", "teacher", "attack", "loss and backward", "optimizer"]),
                          ("04_predictor", ["calibration", "natural images and attack"])):
        words = [*QUICK[script], "--bench", "--restart"]  # which does not delete what is there
        printed = run(tmp_path, script, "--dataset", images, "--preset", "tiny", "--out", "stopped", *words)
        lines = [line.rsplit(maxsplit=2) for line in printed.split("\n") if line.endswith("%")]
        assert [part.strip() for part, *_ in lines] == parts
        assert abs(sum(int(share[:-1]) for *_, share in lines) - 100) <= 25  # medians of parts, on a busy machine
        assert "TFLOP/s" in printed and " GiB at most" in printed and printed.endswith(" h\n")
        flops, = (line for line in printed.split("\n") if "TFLOP/s" in line)
        assert 0 < int(flops.split("% of")[0].split()[-1]) < 100
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


# ---- Honest attacks --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def judged(chains):
    """A trained student as it is judged, 200 test images and their labels."""
    out = chains("resnet50")[0]
    data = torch.load(out.parent.parent / f"data/toy-{SEED}.pt", weights_only=True)
    shared = torch.load(out / "03_progressive.pt", weights_only=True)["weights"]
    predict = c4.calibrated(shared, TINY[0], c5.student_at(TINY[0], 1), data["train"][:500])
    return predict, data["test"][:200], data["test_labels"][:200]


def test_robust_accuracy_is_no_artefact(judged):
    def robust(eps, step_size, steps):
        return c4.judge(*judged, eps, step_size, steps)[1].float().mean().item()
    eps = 8 / 255
    natural = c4.judge(*judged, eps, eps, 1)[0].float().mean().item()
    predict, images, labels = judged
    noise = eps * (2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).round() - 1)
    with torch.no_grad():
        noisy = (predict((images / 255 + noise).clamp(0, 1)).argmax(1) == labels).float().mean().item()
    by_steps = [robust(eps, 2 / 255, steps) for steps in (5, 10, 20, 40)]
    fgsm = robust(eps, eps, 1)
    assert 0.2 < by_steps[2] <= fgsm + 0.005 < noisy - 0.03 and noisy <= natural + 0.01
    assert all(more <= fewer + 0.005 for fewer, more in zip(by_steps, by_steps[1:]))
    by_eps = [natural, *(robust(size / 255, size / 255 / 4, 20) for size in (2, 8, 32)), robust(0.5, 0.1, 20)]
    assert by_eps == sorted(by_eps, reverse=True) and by_eps[-1] < 0.01


def test_the_attacks_gradient_agrees_with_finite_differences(judged):
    predict, images, labels = judged
    weights, blocks = predict.args
    weights = {name: weight.double() for name, weight in weights.items()}
    stats = {name: tuple(part.double() for part in pair) for name, pair in predict.keywords["stats"].items()}

    def loss(x):
        return F.cross_entropy(c4.forward(weights, blocks, x, stats), labels[:8], reduction="sum")
    x = (images[:8] / 255).double().requires_grad_()
    gradient, = torch.autograd.grad(loss(x), x)
    torch.manual_seed(SEED)
    for _ in range(5):
        direction = torch.randn_like(x)
        with torch.no_grad():
            slope = (loss(x + 1e-9 * direction) - loss(x - 1e-9 * direction)) / 2e-9
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-4)


def test_an_image_is_judged_alike_in_any_batch_and_order(judged):
    predict, images, labels = judged
    attack = 8 / 255, 2 / 255, 10
    natural, robust = c4.judge(predict, images, labels, *attack)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(SEED))
    for batch in (7, 64):
        ours = c4.judge(predict, images[order], labels[order], *attack, batch=batch)
        assert torch.equal(ours[0], natural[order]) and torch.equal(ours[1], robust[order])


def test_what_is_attacked_is_what_is_judged(judged):
    predict, images, labels = judged
    stats = {name: [part.clone() for part in pair] for name, pair in predict.keywords["stats"].items()}
    seen = []

    def watched(x):
        seen.append(x.requires_grad)
        return predict(x)
    c4.judge(watched, images[:50], labels[:50], 8 / 255, 2 / 255, 3)
    assert seen == [False, True, True, True, False]  # one function, with its frozen statistics, for all of it
    assert all(torch.equal(a, b) for name in stats for a, b in zip(stats[name], predict.keywords["stats"][name]))


# ---- Bad input: one line, exit code 2, nothing lost ------------------------------------------------------------------
def copy_of(out, tmp_path, *without):
    folder = tmp_path / "runs/toy-mbv3"
    shutil.copytree(out, folder, ignore=shutil.ignore_patterns(*without))
    os.symlink(out.parent.parent / "data", tmp_path / "data")
    return folder


@pytest.mark.parametrize("words, says", [
    (["--net", "vgg"], "--net vgg: choose from mbv3, resnet50, wrn34_10"),
    (["--dataset", "nowhere"], "cifar10, cifar100 or toy, nor a folder with train/ and test/ (train and test missing)"),
    (["--device", "cuda:99"], "no such device"),
    (["--device", "gpu"], "no such device"),
    (["--dataset", "toy", "--students", "0"], "--students must be above 0"),
    (["--dataset", "toy", "--seed", "-1"], "--seed must be between"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_flags(tmp_path, words, says):
    assert says in run(tmp_path, "01_dynamic_net", *words, code=2)
    assert not list(tmp_path.rglob("*"))


def huge_png(path, side):
    """A PNG that says it has so many pixels a side, and holds none."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.parametrize("spoil, says", [
    (lambda root: shutil.rmtree(root / "test"), "(test missing)"),
    (lambda root: [path.unlink() for path in (root / "train/dark").iterdir()], "dark"),
    (lambda root: (root / "train/dark/7.png").write_bytes(b"not a picture"), "train/dark/7.png does not decode"),
    (lambda root: (root / "test/bright/3.png").write_bytes((root / "test/bright/3.png").read_bytes()[:500]),
     "test/bright/3.png does not decode"),
    (lambda root: shutil.rmtree(root / "test/dark"), "train/ and test/ differ in ['dark']"),
    (lambda root: huge_png(root / "train/dark/7.png", 30_000), "train/dark/7.png does not decode (DecompressionBombError)"),
    (lambda root: huge_png(root / "train/dark/7.png", 10_000), "train/dark/7.png does not decode (DecompressionBombWarn"),
], ids=["no test folder", "empty class", "no image", "cut image", "other classes", "900 million pixels", "100 million"])
def test_bad_folders(images, tmp_path, spoil, says):
    shutil.copytree(images, tmp_path / "images")
    spoil(tmp_path / "images")
    assert says in run(tmp_path, "01_dynamic_net", "--dataset", "images", "--preset", "tiny", code=2)
    assert not (tmp_path / "data").exists() and not (tmp_path / "runs").exists()


class Code:
    """Unpickled the usual way, this would write a file."""

    def __reduce__(self):
        return open, ("hacked", "w")


def garble(path):
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 4, len(content) // 2, 16):  # a single one could be in a gap between parts
        content[place] ^= 255
    path.write_bytes(content)


def resave(**changes):
    """Spoils a checkpoint by replacing entries; a function gets the old entry."""
    def spoil(path):
        content = torch.load(path, weights_only=True)
        torch.save(content | {key: new(content[key]) if callable(new) else new for key, new in changes.items()}, path)
    return spoil


def first(change):
    """Spoils the first weight."""
    return resave(weights=lambda weights: {name: change(weight) if i == 0 else weight
                                           for i, (name, weight) in enumerate(weights.items())})


ANY_FILE = {"cut": lambda path: path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2]),
            "empty": lambda path: path.write_bytes(b""), "garbled": garble,
            "text": lambda path: path.write_text("hello\n"), "code": lambda path: torch.save({"settings": Code()}, path)}
SETTINGS = {f"other {name}": resave(settings=lambda settings, name=name: settings | {name: "other"})
            for name in ("net", "dataset", "preset", "classes")}
WEIGHTS = {"no weights": resave(weights={}), "a list": resave(weights=[1, 2]), "a weight missing": resave(
    weights=lambda weights: dict(list(weights.items())[1:])), "a shape": first(lambda weight: weight[..., None]),
    "a type": first(lambda weight: weight.double()), "huge": first(lambda weight: torch.zeros(1).expand(10 ** 12))}
DATA = {"no test": resave(test=None), "labels": resave(train_labels=lambda labels: labels + 3),
        "images": resave(held_out=lambda images: images.float()), "sizes": resave(test=lambda images: images[:, :, 1:]),
        "lengths": resave(train_labels=lambda labels: labels[1:])}
NET = {"no net": resave(net=None), "another net": resave(net=lambda net: (*net[:2], net[2][:-1]))}
TABLE = {"a column": lambda path: edit_row(path, 0, "robust", "sturdy"),
         "a word": lambda path: edit_row(path, 5, "natural", "high"), "nan": lambda path: edit_row(path, 3, "natural", "nan"),
         "code": lambda path: edit_row(path, 3, "natural", "__import__('os').system('touch hacked')"),
         "a cut row": lambda path: path.write_text(path.read_text()[:-9]),
         "a short row": lambda path: path.write_text(path.read_text().rpartition(",")[0] + "\n"),
         "a gene": lambda path: edit_row(path, 3, "expand_1_1", "0.3"), "a long table": lambda path: path.write_text(
             path.read_text() + path.read_text().split("\n")[-2] + "\n")}
SWEEP = [(script, file, name) for script, file, kinds in [
    ("01_dynamic_net", "data", ANY_FILE | DATA), ("01_dynamic_net", "01_dynamic_net.pt", ANY_FILE | SETTINGS | WEIGHTS),
    ("02_teacher_trades", "data", ANY_FILE | DATA), ("02_teacher_trades", "01_dynamic_net.pt", ANY_FILE | SETTINGS | NET),
    ("02_teacher_trades", "02_teacher_state.pt", ANY_FILE | SETTINGS | WEIGHTS),
    ("02_teacher_trades", "02_teacher.pt", ANY_FILE | SETTINGS | WEIGHTS),
    ("02_teacher_trades --judge", "02_teacher.pt", ANY_FILE | SETTINGS | WEIGHTS),
    ("02_teacher_trades --judge", "03_progressive.pt", ANY_FILE | SETTINGS | WEIGHTS),
    ("02_teacher_trades --judge", "05_search.pt", ANY_FILE | SETTINGS),
    ("03_progressive_rslad", "01_dynamic_net.pt", ANY_FILE | SETTINGS | NET),
    ("03_progressive_rslad", "02_teacher.pt", ANY_FILE | SETTINGS | WEIGHTS),
    ("03_progressive_rslad", "03_progressive_state.pt", ANY_FILE | SETTINGS | WEIGHTS),
    ("03_progressive_rslad", "03_progressive.pt", ANY_FILE | SETTINGS | WEIGHTS),
    ("04_predictor", "01_dynamic_net.pt", ANY_FILE | SETTINGS | NET),
    ("04_predictor", "03_progressive.pt", ANY_FILE | SETTINGS | WEIGHTS),
    ("04_predictor", "04_students.csv", TABLE), ("04_predictor", "04_students.pt", ANY_FILE | SETTINGS),
    ("04_predictor", "04_predictor.pt", ANY_FILE | SETTINGS), ("05_nsga2", "01_dynamic_net.pt", ANY_FILE | SETTINGS | NET),
    ("05_nsga2", "04_predictor.pt", ANY_FILE | SETTINGS | WEIGHTS), ("05_nsga2", "05_search.pt", ANY_FILE | SETTINGS)]
    for name in kinds]


@pytest.mark.parametrize("script, file", sorted({case[:2] for case in SWEEP}))
def test_bad_files(images, finished, tmp_path, script, file):
    """Every file that a chapter reads, spoiled in every way: one line, exit code 2, and no file is touched."""
    names = [name for *case, name in SWEEP if case == [script, file]]
    script, *words = script.split()
    words = words or QUICK[script]
    done = {"02_teacher_trades": "02_teacher.pt", "03_progressive_rslad": "03_progressive.pt", "05_nsga2": "05_search.pt",
            "04_predictor": "04_predictor.pt"}.get(script, "")  # without it the chapter reads its other files
    for name in names:
        folder = tmp_path / name
        shutil.copytree(finished[0] / "stopped", folder / "run", ignore=shutil.ignore_patterns(
            ".lock", *({done, "02_teacher_state.pt", "03_progressive_state.pt"} - {file})))
        shutil.copytree(finished[0] / "data", folder / "data")
        path = next((folder / "data").glob("*.pt")) if file == "data" else folder / "run" / file
        {**ANY_FILE, **SETTINGS, **WEIGHTS, **DATA, **NET, **(TABLE if file.endswith(".csv") else {})}[name](path)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
        message = run(folder, script, "--dataset", images, "--preset", "tiny", "--out", "run", *words, code=2)
        assert path.name in message, name
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()
                          and path.name != ".lock"}, name  # and code in it was not run: it would have written a file


def edit_row(path, number, column, value):
    lines = path.read_text().split("\n")
    cells = lines[number].split(",")
    cells[lines[0].split(",").index(column)] = value
    lines[number] = ",".join(cells)
    path.write_text("\n".join(lines))


def test_other_bad_input(chains, tmp_path, images):
    folder = copy_of(chains("mbv3")[0], tmp_path, "05*")
    words = ["--dataset", "toy", "--net", "mbv3", "--seed", SEED]
    for budget in (0.5, "nan"):
        assert "must be at least 0.6241" in run(tmp_path, "05_nsga2", *words, "--max-macs", 1, budget, code=2)
    assert "students 40, not 39" in run(tmp_path, "04_predictor", *words, "--students", 39, code=2)
    bad = "--test-students", 40, "--restart"
    assert "--test-students must be" in run(tmp_path, "04_predictor", *words, *bad, code=2)
    (folder / "04_predictor.pt").unlink()
    first(lambda weight: weight + 1)(folder / "03_progressive.pt")
    assert "04_students.pt was made with weights" in run(tmp_path, "04_predictor", *words, code=2)
    (folder / "04_students.pt").unlink()
    assert "04_students.csv lacks 04_students.pt" in run(tmp_path, "04_predictor", *words, code=2)
    (folder / "02_teacher.pt").unlink()
    message = run(tmp_path, "02_teacher_trades", *words, "--lr", 1e30, "--warmup", 0.001, code=2)
    assert "the loss is not finite in epoch 1, iteration " in message and not (folder / "02_teacher.pt").exists()
    no_folder = images / "test/dark/0.png"
    assert "could not be written" in run(tmp_path, "01_dynamic_net", *words, "--out", no_folder, code=2)


def test_a_download_that_fails(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("offline")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    message = run(tmp_path, "01_dynamic_net", "--dataset", "cifar10", "--data-dir", "empty", code=2)
    assert "could not be downloaded" in message and "put cifar-10-python.tar.gz into empty" in message


# ---- python test_all.py --bench: how much faster than the textbook ---------------------------------------------------
def seconds_of(work, device):
    """Seconds that work() takes, the device's queue included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def bench_iteration(name, device, images, rounds):
    """Chapter 3's iteration on the paper's network, textbook and ours in turn, the same students: a row of the table."""
    args = SimpleNamespace(eps=8.0, step_size=2.0, steps=10, alpha=5 / 6, device=device, precision=None, settings={})
    args.net = net = c1.make_net(name, "paper", 10)
    dtype, torch.backends.cudnn.benchmark = c3.conv_dtype(args), False
    init = {key: weight.to(device) for key, weight in weights_of(net, dtype=torch.float32).items()}
    data = torch.randint(256, (5000, 3, 32, 32), dtype=torch.uint8)
    loader = iter(torch.utils.data.DataLoader(TextbookImages(data), images, shuffle=True, num_workers=2))
    data = data.to(device)
    largest = c3.blocks_of(net, c3.student_at(net, -1))
    teachers = [textbook(init, largest), c3.calibrated(init, net, c3.student_at(net, -1), data[:500], dtype)]
    shares = [{key: weight.clone().requires_grad_() for key, weight in init.items()} for _ in range(2)]
    optimizers = [torch.optim.SGD(shared.values(), 1e-3, 0.9, weight_decay=2e-4) for shared in shares]

    def theirs():
        x = next(loader).to(device)
        with torch.no_grad():
            target = teachers[0](x).softmax(1)
        textbook_losses(shares[0], blocks, x, target, args)[0].backward()
        optimizers[0].step()

    def ours():
        x = c3.augment(data[torch.randint(5000, (images,), device=device)])
        weights = c3.slice_weights(shares[1], blocks, dtype)
        with torch.no_grad():
            target = teachers[1](x).log_softmax(1)
        loss, *_ = c3.rslad_loss(weights, blocks, x, target, args)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
    times = []
    for i in range(rounds + 1):
        blocks = c3.blocks_of(net, c3.sample(net, random.Random(i)))
        times.append([seconds_of(theirs, device), seconds_of(ours, device)])
    times = np.array(times[1:])  # the first round warms up
    return {"03, an iteration": f"{name}, {images} images, {args.precision}", "textbook ms": 1e3 * np.median(times[:, 0]),
            "ours ms": 1e3 * np.median(times[:, 1]), "ratio": np.median(times[:, 0] / times[:, 1])}


def bench_student(name, device, rounds):
    """Chapter 4's measurement of a student, PGD-20 on 20 images of which 8 are classified right: the straightforward
    loop attacks all of them, channels first, with a slice in every forward pass."""
    net = c1.make_net(name, "paper", 10)
    shared = {key: weight.to(device) for key, weight in weights_of(net, dtype=torch.float32).items()}
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8, device=device)
    times = []
    for i in range(rounds + 1):
        student = c4.sample(net, random.Random(i))
        predict = c4.calibrated(shared, net, student, images)
        answers = predict(images / 255).argmax(1)
        labels = torch.where(torch.arange(20, device=device) < 8, answers, (answers + 1) % 10)

        def theirs():
            plain, x = textbook({key: weight.requires_grad_() for key, weight in shared.items()},
                                c4.blocks_of(net, student)), images / 255
            x_adv = x + (2 * torch.rand_like(x) - 1) * 8 / 255
            for _ in range(20):
                x_adv = x_adv.detach().requires_grad_()
                F.cross_entropy(plain(x_adv), labels).backward()
                x_adv = torch.min(torch.max(x_adv + 2 / 255 * x_adv.grad.sign(), x - 8 / 255), x + 8 / 255).clamp(0, 1)
            return (plain(x).argmax(1) == labels) & (plain(x_adv).argmax(1) == labels)
        times.append([seconds_of(theirs, device), seconds_of(lambda: c4.judge(
            predict, images, labels, 8 / 255, 2 / 255, 20), device)])
    times = np.array(times[1:])
    return {"04, a student": f"{name}, 20 images", "textbook ms": 1e3 * np.median(times[:, 0]),
            "ours ms": 1e3 * np.median(times[:, 1]), "ratio": np.median(times[:, 0] / times[:, 1])}


def bench_search(name):
    """Chapter 5's search on the paper's network, one core: 100 generations of 100, and 10 of 100, 400 and 1,600."""
    net = c1.make_net(name, "paper", 10)
    torch.manual_seed(0)
    predictor = {key: torch.randn(shape) * 0.05 for key, shape in c5.predictor_shapes(net, 6, 400).items()}
    budget, threads = c1.cost(net, c5.student_at(net, 1))[1], torch.get_num_threads()

    def seconds(population, generations):
        macs_of = c5.macs_counter(net)

        def evaluate(students):
            macs = np.array([macs_of(student) for student in students])
            return c5.predict_accuracy(predictor, net, students).double().numpy(), (macs - budget).clip(min=0)
        return seconds_of(lambda: c5.nsga2(net, evaluate, population, generations, 0.1, 0), torch.device("cpu"))
    torch.set_num_threads(1)
    row = {"05, seconds": name, "100 x 100": seconds(100, 100),
           **{f"a generation of {size}": seconds(size, 10) / 10 for size in (100, 400, 1600)}}
    torch.set_num_threads(threads)
    return row


def bench_memory(name, device):
    """Chapter 3's memory over 200 random students of the paper's network, two images each, which does not grow; and with
    its largest student and 128 images."""
    args = SimpleNamespace(eps=8.0, step_size=2.0, steps=1, alpha=5 / 6)  # more steps would need no more memory
    net = c1.make_net(name, "paper", 10)
    shared = {key: weight.to(device).requires_grad_() for key, weight in weights_of(net, dtype=torch.float32).items()}
    optimizer = torch.optim.SGD(shared.values(), 1e-3, 0.9, weight_decay=2e-4)
    row = {"03, GiB at most": name}
    for i in range(202):
        x = torch.rand(128 if i == 201 else 2, 3, 32, 32, device=device)
        blocks = c3.blocks_of(net, c3.sample(net, random.Random(i)) if 0 < i < 201 else c3.student_at(net, -1))
        target = torch.zeros(len(x), 10, device=device).log_softmax(1)
        loss, *_ = c3.rslad_loss(c3.slice_weights(shared, blocks), blocks, x, target, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i in (50, 200, 201):
            row[{50: "50 students", 200: "200 students", 201: "128 images"}[i]] = (
                torch.cuda.max_memory_allocated() if device.type == "cuda" else
                1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2 ** 30
    return row


def bench():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(os.cpu_count())
    batches = {"resnet50": 128, "mbv3": 128} if device.type == "cuda" else {"resnet50": 16, "mbv3": 32}
    for name, images in batches.items():
        for row in (lambda: bench_search(name), lambda: bench_iteration(name, device, images, 5),
                    lambda: bench_student(name, device, 2)):
            c5.finish(None, [row()])
            print(flush=True)
    c5.finish(None, [bench_memory("resnet50", device)])


if __name__ == "__main__":
    sys.exit(bench() if sys.argv[1:] == ["--bench"] else pytest.main([__file__, *sys.argv[1:]]))
