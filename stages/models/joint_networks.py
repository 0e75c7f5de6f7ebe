"""Networks of several members: ensembles, and networks with a common trunk and gated branches (ONE).

ONE: Lan, Zhu, Gong 2018, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS (arXiv 1806.04606).

A recipe builds them as any network, to load one that a cohort has trained:

    model = { name = "ensemble", args = { members = [{ name = "cnn" }, { name = "resnet8" }] }, weights = "..." }
    model = { name = "gated_branches", args = { member = { name = "resnet8" }, branch_at = "layer3", count = 3 } }
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.hooks import get_module

ENSEMBLE, GATED_BRANCHES = "ensemble", "gated_branches"
JOINT_NETWORKS = (ENSEMBLE, GATED_BRANCHES)

MAX_MEMBERS = 8


class Ensemble(nn.Module):
    """Networks side by side: images [B, C, H, W] to the mean of their logits, [B, num_classes].

    In training each member may have images of its own, one behind the other along the channels: [B, K C, H, W].
    """

    def __init__(self, members: Sequence[nn.Module], in_channels: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.in_channels = in_channels

    def inputs(self, images: Tensor) -> Sequence[Tensor]:
        """Return the images of each member."""
        count = len(self.members)
        return [images] * count if images.shape[1] == self.in_channels else images.chunk(count, 1)

    def forward(self, images: Tensor) -> Tensor:
        pairs = zip(self.members, self.inputs(images), strict=True)
        return torch.stack([member(own) for member, own in pairs]).mean(0)


class GatedBranches(nn.Module):
    """ONE: images [B, C, H, W] to sum_i g_i z_i, [B, num_classes], of branches on the features of one trunk.

    The gates g = softmax(ReLU(BatchNorm(Linear(features averaged over positions)))) are [B, num_branches]. `members`
    are the branches, whose outputs are the logits z_i.
    """

    def __init__(self, trunk: nn.Module, branches: Sequence[nn.Module], num_features: int) -> None:
        super().__init__()
        self.trunk, self.members, count = trunk, nn.ModuleList(branches), len(branches)
        layers = [nn.Linear(num_features, count), nn.BatchNorm1d(count), nn.ReLU(), nn.Softmax(1)]
        self.gate = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images)
        gates = self.gate(features.flatten(2).mean(2) if features.dim() > 2 else features)
        logits = torch.stack([member(features.clone()) for member in self.members], 2)  # it may begin in place
        joined: Tensor = (logits * gates[:, None]).sum(2)
        return joined

    def member_state(self, number: int) -> dict[str, Tensor]:
        """Return the weights of the plain network of the trunk and one branch."""
        return self.trunk.state_dict() | self.members[number].state_dict()


def branch(networks: Sequence[nn.Module], path: str, image_shape: tuple[int, int, int], *, seed: int) -> GatedBranches:
    """Join networks of one architecture: the first one's trunk before the module `path`, and what follows of each.

    Args:
        networks: The untrained networks, in training mode.
        path: The first module that each branch has of its own.
        image_shape: (C, H, W).
        seed: Initializes the gate.

    Raises:
        ModelError: They cannot be divided there.
    """
    try:
        get_module(networks[0], path)
    except ModelError as error:
        raise ModelError(f"branch_at = {path!r}: {error}") from error
    parts = [_divided(network, path) for network in networks]
    trunk = parts[0][0]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        features = trunk.eval()(torch.zeros(2, *image_shape))
        trunk.train()
        torch.default_generator.manual_seed(seed)
        if not isinstance(features, Tensor) or features.dim() not in (2, 4):
            raise ModelError(_refusal(path, "what goes into it is neither a vector nor a map of features"))
        return GatedBranches(trunk, [part for _, part in parts], features.shape[1])


def _refusal(path: str, reason: str) -> str:
    return f"the network cannot be divided at {path!r} (branch_at): {reason}; choose another module or network."


def _divided(network: nn.Module, path: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return the part of a network before its first call of the module `path`, and the rest. Raises ModelError."""
    graphs = []
    for training in (False, True):
        try:
            graphs.append(fx.symbolic_trace(network.train(training)))
        except Exception as error:  # tracing a user's forward may raise anything
            reason = f"its forward pass cannot be traced by torch.fx ({cause(error)})"
            raise ModelError(_refusal(path, reason)) from error
    if graphs[0].code != graphs[1].code:
        raise ModelError(_refusal(path, "its forward pass asks itself whether it is in training"))
    nodes = list(graphs[1].graph.nodes)
    first = next((number for number, node in enumerate(nodes) if _is_inside(node, path)), None)
    if first is None:
        raise ModelError(_refusal(path, "the forward pass does not call it"))
    before, after, behind = nodes[:first], nodes[first:-1], set(nodes[first:])
    crossing = [node for node in before if behind & set(node.users)]
    if any(node.op == "placeholder" for node in crossing):
        raise ModelError(_refusal(path, "nothing before it would be shared, or the images are used behind it again"))
    if len(crossing) != 1:
        raise ModelError(_refusal(path, "more than one tensor goes from the part before it to the part behind it"))
    (output,) = nodes[-1].args
    if not isinstance(output, fx.Node):
        raise ModelError(_refusal(path, "the network does not return one tensor"))
    parts = _part(network, before, None, crossing[0]), _part(network, after, crossing[0], output)
    if parts[0].state_dict().keys() & parts[1].state_dict().keys():
        raise ModelError(_refusal(path, "both parts use the same weights"))
    if parts[0].state_dict().keys() | parts[1].state_dict().keys() != network.state_dict().keys():
        raise ModelError(_refusal(path, "some of its weights are not used in the forward pass"))
    return parts


def _is_inside(node: fx.Node, path: str) -> bool:
    """Return whether an operation belongs to the module at `path`."""
    own = [str(node.target)] if node.op in ("call_module", "get_attr") else []
    names = [*own, *node.meta.get("nn_module_stack", {})]
    return any(name == path or name.startswith(f"{path}.") for name in names)


def _part(network: nn.Module, nodes: Sequence[fx.Node], given: fx.Node | None, output: fx.Node) -> fx.GraphModule:
    """Return a module of some operations of a network, with the network's own submodules at their paths."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    if given is not None:
        copies[given] = graph.placeholder("features")
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[output])
    return fx.GraphModule(network, graph).train()


Construct = Callable[[str, Mapping[str, Any]], nn.Module]
"""Builds a member from its name and arguments."""


def build_joint_network(
    name: str, args: Mapping[str, Any], construct: Construct, image_shape: tuple[int, int, int]
) -> nn.Module:
    """Build an ensemble, or gated branches, from the arguments in a recipe or record.

    Raises:
        ModelError: Its arguments are wrong, or the network cannot be divided.
    """
    if name == ENSEMBLE:
        if args.keys() != {"members"} or not isinstance(args["members"], list) or len(args["members"]) > MAX_MEMBERS:
            raise ModelError(f"{name} takes args = {{ members = [...] }}, a list of at most {MAX_MEMBERS} networks.")
        members = [construct(*_named(name, one)) for one in args["members"]]
        return Ensemble(members, image_shape[0])
    count = args.get("count")
    is_right = args.keys() == {"member", "branch_at", "count"} and isinstance(args["branch_at"], str)
    if not is_right or type(count) is not int or not 2 <= count <= MAX_MEMBERS:
        raise ModelError(f"{name} takes args = {{ member = {{ ... }}, branch_at = ..., count = 2 to {MAX_MEMBERS} }}.")
    members = [construct(*_named(name, args["member"])) for _ in range(count)]
    return branch(members, args["branch_at"], image_shape, seed=0)


def _named(name: str, member: object) -> tuple[str, Mapping[str, Any]]:
    """Return name and arguments of a member. Raises ModelError."""
    if isinstance(member, Mapping) and {"name"} <= member.keys() <= {"name", "args"}:
        own, args = member["name"], member.get("args", {})
        if isinstance(own, str) and isinstance(args, Mapping) and own not in JOINT_NETWORKS:
            return own, args
    raise ModelError(f"{name}: a member is {{ name = ..., args = {{ ... }} }}, and not {str(member)[:80]}.")
