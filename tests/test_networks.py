"""The networks: sizes known from the literature, names of published checkpoints, normalization as the first layer."""
import pytest
import torch
import torchvision
from torch import nn

from singlestep import methods, networks, options, train
from singlestep.networks import PreActResNet18, WideResNet
from singlestep.run.device import memory_format


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_preactresnets_have_the_convolutions_of_the_resnets_of_their_depth(depth):
    def sizes(network):
        return sorted(m.weight.shape for m in network.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 3)

    with torch.device("meta"):
        network = getattr(networks, f"PreActResNet{depth}")()
        assert sizes(network) == sizes(getattr(torchvision.models, f"resnet{depth}")())
    if depth == 18:
        assert sum(p.numel() for p in network.parameters()) == 11_172_170


@pytest.mark.parametrize("depth, width_factor, size", [
    (28, 10, 36_479_194), (28, 8, 23_354_842), (34, 10, 46_160_474), (40, 2, 2_243_546)])
def test_wideresnets_have_their_known_sizes(depth, width_factor, size):
    args = options.arguments(options.CIFAR10, dict(model="WideResNet", depth=depth, width_factor=width_factor))
    with torch.device("meta"):
        assert sum(p.numel() for p in networks.new_network(options.CIFAR10, args).parameters()) == size


def test_without_the_final_norm_the_last_layer_reads_the_last_stage():
    args = options.arguments(options.CIFAR10, dict(base_width=4, no_final_norm=True, mean=(0,) * 3, std=(1,) * 3))
    network, x = networks.new_network(options.CIFAR10, args).eval(), torch.rand(2, 3, 8, 8)
    stages = nn.Sequential(network.conv1, network.layer1, network.layer2, network.layer3, network.layer4)
    torch.testing.assert_close(network(x), network.linear(stages(x).mean(dim=(2, 3))))
    assert not any(key.startswith("bn.") for key in network.state_dict())


@pytest.mark.parametrize("build", [
    lambda **k: PreActResNet18(base_width=4, **k), lambda **k: networks.PreActResNet50(base_width=4, **k),
    lambda **k: WideResNet(10, 1, **k)])
def test_networks_take_images_of_any_size_to_logits_of_any_number_of_classes(build):
    network = build(num_classes=7)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert network(torch.rand(2, 3, 40, 24)).shape == (2, 7)


@pytest.mark.parametrize("build", [lambda **k: PreActResNet18(base_width=4, **k), lambda **k: WideResNet(10, 1, **k)])
def test_normalization_is_the_first_layer_and_adds_no_key(build):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    plain, normalized = build().eval(), build(mean=mean, std=std).eval()
    assert plain.state_dict().keys() == normalized.state_dict().keys()
    normalized.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    scaled = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalized(x), plain(scaled))


@pytest.mark.parametrize("name", methods.MODELS)
def test_every_network_of_the_command_line_is_built_as_wide_as_asked(name):
    args = options.parse(options.CIFAR10, argv=[f"--model={name}", "--base-width=3", "--width-factor=2"])
    with torch.device("meta"):
        network = train.new_network(options.CIFAR10, args)
    stem = network.block1.layer[0].conv1 if name == "WideResNet" else network.conv1
    assert stem.out_channels == (32 if name == "WideResNet" else 3)
    convolutions = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in network.modules())
    assert convolutions == {"WideResNet": 31, "ResNet18": 17, "PreActResNet18": 17, "PreActResNet34": 33,
                            "PreActResNet50": 17, "PreActResNet101": 34, "PreActResNet152": 51}[name]


def test_the_names_are_those_of_published_checkpoints():
    keys = PreActResNet18(base_width=4).state_dict().keys()
    for key in ("conv1.weight", "layer1.0.bn1.weight", "layer1.0.conv1.weight", "layer2.0.shortcut.0.weight",
                "layer4.1.conv2.weight", "bn.running_mean", "linear.bias"):
        assert key in keys
    keys = WideResNet(10, 2).state_dict().keys()
    for key in ("conv1.weight", "block1.layer.0.bn1.weight", "block1.layer.0.convShortcut.weight", "bn1.bias",
                "fc.weight"):
        assert key in keys


def test_a_blocks_shortcut_convolution_reads_the_activated_input_and_an_identity_the_raw_one():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    block = networks.PreActBlock(4, 8, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    torch.testing.assert_close(block(x), block.shortcut(torch.relu(block.bn1(x))))
    block = networks.PreActBlock(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x)


def test_channels_last_is_left_where_onednn_fails_in_it():
    cpu, last = torch.device("cpu"), torch.channels_last
    with torch.device("meta"):
        layouts = {PreActResNet18(base_width=8): torch.contiguous_format, PreActResNet18(base_width=16): last,
                   networks.PreActResNet50(base_width=8): last, WideResNet(10, 1): last}
    for network, layout in layouts.items():
        assert memory_format(network, cpu) is layout
        assert memory_format(network, torch.device("cuda")) is last


def test_the_number_of_classes_can_be_given_by_position():
    """As with the published networks."""
    with torch.device("meta"):
        assert networks.PreActResNet18(7).linear.out_features == 7
