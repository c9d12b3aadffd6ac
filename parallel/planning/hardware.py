"""What step times are computed from: speeds of devices and networks, as constants that a benchmark can replace."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator


class Device(BaseModel):
    """One process's device."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(description="What it is called.")
    memory_gib: float = Field(gt=0.0, description="Memory in GiB.")
    reserved_gib: float = Field(ge=0.0, description="Of it for the CUDA context, NCCL and fragmentation.")
    flops_per_second: dict[Literal["bf16", "fp32"], PositiveFloat] = Field(
        min_length=2, description="Dense peak of matrix products."
    )
    bytes_per_second: float = Field(gt=0.0, description="Peak of the memory, read and written together.")
    product_efficiency: float = Field(
        gt=0.0, le=1.0, description="Part of the peak that large products of a layer reach."
    )
    attention_efficiency: float = Field(gt=0.0, le=1.0, description="The same for attention, counted in full.")
    memory_efficiency: float = Field(gt=0.0, le=1.0, description="Part of the peak that element-wise work reaches.")
    product_ramp_flops: float = Field(ge=0.0, description="A product of so many FLOPs reaches half of the efficiency.")
    launch_seconds: float = Field(ge=0.0, description="Time that one operator takes at least.")
    link_bytes_per_second: float = Field(gt=0.0, description="One direction, to the other devices of the node.")
    link_latency: float = Field(ge=0.0, description="Seconds of a collective step inside the node.")
    gather_cost: float = Field(gt=0.0, description="An all-gather or reduce-scatter over an all-reduce; of rings 0.5.")
    overlap: float = Field(
        ge=0.0,
        le=1.0,
        description="Part of what data parallelism sends that parallel.overlap_gradient_reduction hides.",
    )

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.reserved_gib >= self.memory_gib:
            raise ValueError(f"reserved_gib={self.reserved_gib:g} leaves nothing of memory_gib={self.memory_gib:g}")
        return self


class Network(BaseModel):
    """Between nodes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(description="What it is called.")
    bytes_per_second: float = Field(gt=0.0, description="One direction, of one port.")
    shared: bool = Field(default=False, description="All devices of a node share one port; else each has its own.")
    efficiency: float = Field(gt=0.0, le=1.0, description="Part of it that collectives reach.")
    latency: float = Field(ge=0.0, description="Seconds of a collective step.")


# Peaks are the vendors', from NVIDIA's data sheets of A100, H100 SXM and H200: dense bf16 on tensor cores; in fp32 the
# plain rate, because torch does not use tf32 by default; HBM; NVLink in one direction, half of what is advertised.
# Efficiencies are assumptions of common size, for a calibration to replace: of products of training size 0.6 to 0.65,
# of attention a third (it is counted in full, and half of it is masked), of the memory's rate four fifths.
_GPU = {
    "attention_efficiency": 0.35,
    "memory_efficiency": 0.8,
    "launch_seconds": 5e-6,
    "link_latency": 1e-5,
    "gather_cost": 0.5,
    # Unknown until it is measured.
    "overlap": 0.0,
    "reserved_gib": 2.5,
}
DEVICES = {
    device.name: device
    for device in (
        Device(
            name="a100-40g",
            memory_gib=39.4,
            flops_per_second={"bf16": 312e12, "fp32": 19.5e12},
            bytes_per_second=1.555e12,
            product_efficiency=0.65,
            product_ramp_flops=2e9,
            link_bytes_per_second=300e9,
            **_GPU,
        ),
        Device(
            name="a100-80g",
            memory_gib=79.1,
            flops_per_second={"bf16": 312e12, "fp32": 19.5e12},
            bytes_per_second=2.039e12,
            product_efficiency=0.65,
            product_ramp_flops=2e9,
            link_bytes_per_second=300e9,
            **_GPU,
        ),
        Device(
            name="h100-80g",
            memory_gib=79.1,
            flops_per_second={"bf16": 989e12, "fp32": 67e12},
            bytes_per_second=3.35e12,
            product_efficiency=0.6,
            product_ramp_flops=6e9,
            link_bytes_per_second=450e9,
            **_GPU,
        ),
        Device(
            name="h200-141g",
            memory_gib=139.8,
            flops_per_second={"bf16": 989e12, "fp32": 67e12},
            bytes_per_second=4.8e12,
            product_efficiency=0.6,
            product_ramp_flops=6e9,
            link_bytes_per_second=450e9,
            **_GPU,
        ),
        # One core of a server processor with AVX-512, at 2.5 GHz with one 512-bit multiply-add unit in use: 16 values
        # x 2. Between processes, gloo over the loopback device, measured with 1 to 44 MB: it scatters and gathers more
        # slowly than it sums.
        Device(
            name="cpu",
            memory_gib=8.0,
            reserved_gib=0.5,
            flops_per_second={"bf16": 80e9, "fp32": 80e9},
            bytes_per_second=20e9,
            product_efficiency=0.8,
            attention_efficiency=0.3,
            memory_efficiency=0.6,
            product_ramp_flops=0.0,
            launch_seconds=1e-5,
            link_bytes_per_second=1.5e9,
            link_latency=8e-5,
            gather_cost=1.2,
            overlap=0.0,
        ),
    )
}
# Rates of one port in one direction: 400 and 200 Gbit/s of InfiniBand per device, one 100 Gbit/s Ethernet port that
# all devices of a node share. Collectives reach about four fifths of InfiniBand, half of TCP.
NETWORKS = {
    network.name: network
    for network in (
        Network(name="infiniband-400", bytes_per_second=50e9, efficiency=0.8, latency=1.5e-5),
        Network(name="infiniband-200", bytes_per_second=25e9, efficiency=0.8, latency=1.5e-5),
        Network(name="ethernet-100", bytes_per_second=12.5e9, shared=True, efficiency=0.5, latency=5e-5),
    )
}
NO_NETWORK = "nvlink-only"
