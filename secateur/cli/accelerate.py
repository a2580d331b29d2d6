"""`secateur accelerate`: a model whose layers are packed where that is faster on this machine."""

from secateur.cli import options as o
from secateur.cli.bench import AS_STORED
from secateur.cli.choices import BY_DEFAULT, Choice, show_choices
from secateur.cli.command import command
from secateur.cli.console import emit, say
from secateur.cli.groups import Loading, Out
from secateur.cli.source import bytes_of, model_files, open_folder, recorded_reports
from secateur.core.tables import as_bytes
from secateur.formats.pack import packed_share


@command()
def accelerate(
    *,
    model: o.Folder,
    out: Out,
    choice: Choice = BY_DEFAULT,
    loading: Loading = AS_STORED,
    full: o.Full = False,
    json: o.Json = False,
) -> None:
    """Measure every layer on this machine, pack those that are faster so, and write the model.

    A layer stays dense unless packed is faster at one number of tokens and slower at none. Where
    no layer gains, nothing is written. `secateur generate` and `sc.load` run what is written.
    """
    out.require_writable()
    choice.require_valid()
    source = open_folder(model, loading.dtype, loading.device)
    plan, reports = recorded_reports(model)
    report = choice.made_for(source.model)
    gained = [layer.layer for layer in report.layers if layer.table]
    if not json:
        show_choices(report, full)
    if not gained:
        raise ValueError(
            f"{out.folder} is not written: none of {len(report.layers)} layers is faster packed "
            f"on {report.device}; secateur export packs them to save room all the same"
        )
    source.model.to("cpu")  # what is stored, not what the kernels here read
    out.write(source, plan, reports)
    written = bytes_of(model_files(out.folder))
    if json:
        sizes = {"output": str(out.folder), "bytes": [source.size, written]}
        emit({**sizes, **report.to_dict()})
        return
    before = as_bytes(source.size)
    say(f"written to {out.folder}: {as_bytes(written)}, {model} has {before}")
    say(packed_share(source.model))
