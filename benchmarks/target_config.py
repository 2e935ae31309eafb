"""XLA's own description of the attached GPU, for tests that compile for a card which is not there.

    python -m benchmarks.target_config --output DIR [--smoke]

Writes DIR/target_config.textproto, to replace sana_jax/aot/h200.textproto.  The description
is reached in several ways, tried in turn, because none is a public interface; the log says which
worked.  With --smoke, on a machine without a GPU, it only prints what each of them answers.
"""

import pathlib

from benchmarks import environment


def ways(devices):
    """(name, function without arguments) for each way that some jax has had."""
    from jax._src.lib import xla_client

    topology = xla_client.get_topology_for_devices(devices)
    yield "topology.target_config", lambda: topology.target_config

    def from_attributes():
        return dict(topology.get_attributes())["target_config"]

    yield "topology.get_attributes()", from_attributes
    yield "client.topology.target_config", lambda: devices[0].client.topology.target_config
    yield "client.target_config", lambda: devices[0].client.target_config

    def from_experimental():
        from jax.experimental import topologies

        return topologies.get_attached_topology().target_config

    yield "topologies.get_attached_topology()", from_experimental

    def as_bytes():
        text = topology.serialize()
        start = text.find(b"gpu_device_info")
        if start < 0:
            raise ValueError(f"no text of a target in {len(text)} serialized bytes")
        return text[start:].decode(errors="replace")

    yield "topology.serialize(), text inside", as_bytes


def main():
    args = environment.arguments(__doc__).parse_args()
    import jax

    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    devices, rows, text = jax.devices(), [], None
    for name, way in ways(devices):
        row = environment.attempt({"way": name}, lambda way=way: {"text": str(way())})
        if text is None and "gpu_device_info" in row.get("text", ""):
            text = row["text"]
        rows.append(row | {"characters": len(row.pop("text", ""))})
    topology = jax._src.lib.xla_client.get_topology_for_devices(devices)
    try:
        (output / "topology.bin").write_bytes(topology.serialize())  # binary proto: a last resort
    except Exception as error:
        print(f"topology.serialize(): {error}")
    if text is not None:
        (output / "target_config.textproto").write_text(text)
    environment.write_result(output / "target_config.json", rows, device=devices[0].device_kind)
    print(environment.table(rows, ("way", "characters", "error")))
    print("written" if text is not None else f"no description found on {devices[0].platform}")
    return 0 if text is not None or args.smoke else 1


if __name__ == "__main__":
    raise SystemExit(main())
