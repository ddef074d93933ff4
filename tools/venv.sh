#!/bin/sh
# usage: PYTHON=python3 [JAX=0.10.2] tools/venv.sh VENV EXTRA
#
# Brings the virtual environment VENV up to date and installs lowbit into it, editable, with the optional dependencies
# EXTRA. Does nothing when that was already done. VENV is made afresh when it was made by another interpreter or for
# another jax; the extras that it already has are installed again when pyproject.toml changes.
set -eu

venv=$1
extra=$2
stamp=$venv/.lowbit-stamp

fail() {
    echo "error: $*" >&2
    exit 1
}

# A version manager may put a python3.13 on PATH that only prints a complaint, so a candidate has to run.
runs() { "$1" -c '' >/dev/null 2>&1; }

find_python() {
    if runs "$1"; then echo "$1"; return; fi
    for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"${1#python}"*/bin/"$1"; do
        if runs "$candidate"; then echo "$candidate"; return; fi
    done
    return 1
}

python=$(find_python "${PYTHON:-python3}") || fail "no working '${PYTHON:-python3}' on PATH." \
    "Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"
if [ "$extra" = --find ]; then echo "$python"; exit; fi

version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is Python $version;" \
    "lowbit needs 3.11 or newer. Name another interpreter: make PYTHON=python3.13"

base="python $version $("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))') jax ${JAX:-any}"
project="pyproject $(cksum <pyproject.toml)"
extras=$extra

if [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$base" ]; then
    have=$(sed -n 3p "$stamp")
    case ",$have," in
        *",$extra,"*) if [ "$(sed -n 2p "$stamp")" = "$project" ]; then exit; fi; extras=$have ;;
        *) extras=$have,$extra ;;
    esac
else
    if [ -e "$venv" ]; then
        [ -f "$venv/pyvenv.cfg" ] || fail "$venv exists and is no virtual environment; move it away or set VENV=..."
        rm -rf "$venv"
    fi
    echo "making $venv with Python $version"
    "$python" -m venv "$venv" || fail "'$python -m venv' failed; some systems package it apart (python3-venv)"
fi

echo "installing lowbit[$extras]${JAX:+ with jax $JAX} into $venv (about a minute)"
set -- --editable ".[$extras]"
if [ -n "${JAX:-}" ]; then set -- "$@" "jax==$JAX.*" "jaxlib==$JAX.*"; fi
rm -f "$stamp"
"$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "$@"
printf '%s\n%s\n%s\n' "$base" "$project" "$extras" >"$stamp"
