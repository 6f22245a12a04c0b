#!/usr/bin/env bash
# Pack what a GPU machine without a network lacks for benchmark/gpu.py, and print the command to call there.
#
#     benchmark/gpu_prepare.sh --torch 2.11 --transformers 5.17 --python 3.12       # the versions of that machine
#     benchmark/gpu_prepare.sh --have "pyarrow pandas tensorboard"                  # it has these, too
#     benchmark/gpu_prepare.sh --with trl==1.9.0                                    # for the part peer
#     benchmark/gpu_prepare.sh --dry-run                                            # print the commands
#
# torch, transformers and all they need are taken to be there. Carry the repository with the folder of wheels, which git
# ignores. The machine must have pip and this one's processor architecture. For Python 3.12 the wheels take 51 MiB, of
# which pyarrow takes 32: what the scripts never load is taken out of its 52.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch=2.11 transformers=5.17 python="" have="" with="" limit=64 folder=runs/gpu_wheels dry_run=""
while (($#)); do
    case $1 in
    --dry-run) dry_run=1 ;;
    --torch | --transformers | --python | --have | --with | --limit | --folder) # limit: MiB of all wheels
        (($# > 1)) || { echo "error: $1 needs a value" >&2 && exit 2; }
        declare "${1#--}=$2"
        shift
        ;;
    *) echo "error: there is no flag $1" >&2 && exit 2 ;;
    esac
    shift
done
python=${python:-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
read -ra more <<<"$with"

# What the scripts import
needs=(datasets tyro tensorboard tqdm "${more[@]}")
# What tensorboard and datasets list among their needs, and the scripts never import
unused="grpcio markdown pillow setuptools tensorboard-data-server werkzeug"
# Of pyarrow: headers and tests, clients of remote file systems, Flight, ORC, and a library that is there three times
strip='^pyarrow/(tests|include|includes|src)/|_flight|_s3|_gcsfs|_azurefs|_hdfs|_orc|\.p(yx|xd|xi)$'
strip+='|libarrow_python(_parquet_encryption)?\.so($|\.[0-9]+\.)'

run() {
    if [[ $dry_run ]]; then printf '%q ' "$@" && echo; else "$@"; fi
}

pip=(python3 -m pip --quiet --disable-pip-version-check)
target=(--only-binary=:all: --python-version "$python")
run rm -rf "$folder"
run mkdir -p "$folder"
run "${pip[@]}" install --dry-run --ignore-installed --target "$folder" --report "$folder/report.json" "${target[@]}" \
    "torch==$torch.*" "transformers==$transformers.*" "${needs[@]}"
if [[ $dry_run ]]; then
    chosen=(PACKAGE==VERSION ...)
else
    list=$(python3 - "$folder/report.json" "$python" "torch transformers $have" "$unused" <<'CODE'
import json, re, sys

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

report, python, have, unused = sys.argv[1:]
found = {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in json.load(open(report))["install"]}
there, ahead = set(), [Requirement(name) for name in have.split()]
while ahead:
    need = ahead.pop()
    name, extras = canonicalize_name(need.name), {"", *need.extras}
    if not {(name, extra) for extra in extras} <= there:
        there |= {(name, extra) for extra in extras}
        marks = [dict(extra=extra, python_version=python, python_full_version=f"{python}.0") for extra in extras]
        for more in map(Requirement, found.get(name, {}).get("requires_dist", [])):
            if not more.marker or any(map(more.marker.evaluate, marks)):
                ahead.append(more)
for name in sorted(found.keys() - {name for name, _ in there} - set(unused.split())):
    print(f"{name}=={found[name]['version']}")
CODE
    )
    mapfile -t chosen <<<"$list"
fi
run "${pip[@]}" download --no-deps --dest "$folder" "${target[@]}" "${chosen[@]}"
run rm -f "$folder/report.json"
if [[ ! $dry_run ]]; then
    python3 - "$folder" "$strip" "$limit" <<'CODE'
import re, sys, zipfile
from pathlib import Path

folder, strip, limit = Path(sys.argv[1]), re.compile(sys.argv[2]), float(sys.argv[3])
for wheel in folder.glob("pyarrow-*.whl"):
    whole = wheel.rename(wheel.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(wheel, "w") as small:
        for entry in source.infolist():
            if not strip.search(entry.filename):
                small.writestr(entry, source.read(entry), zipfile.ZIP_DEFLATED, 9)
    whole.unlink()
sizes = {wheel.name: wheel.stat().st_size / 2**20 for wheel in folder.glob("*.whl")}
for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
    print(f"{size:6.1f} MiB  {name}")
print(f"{sum(sizes.values()):6.1f} MiB  together; the limit is {limit:g}")
if sum(sizes.values()) > limit:
    sys.exit("error: too large; name what the machine has in --have, or carry the wheels in several transfers")
CODE
fi
site=/tmp/gpu/site-packages # dill, which datasets calls, copies modules in a folder of another name instead of naming them
cat <<END

On that machine, in this folder:

python3 -m pip install -q --no-index --no-deps --no-compile --target $site $folder/*.whl &&
    PYTHONPATH=$site python3 benchmark/gpu.py --output-dir runs/gpu
END
