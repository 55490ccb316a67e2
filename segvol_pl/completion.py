"""`segvol-pl completion SHELL`: a script that completes commands, keys and the values of keys with choices.

The script holds all words, from the schemas: completing starts no Python. Where a word is none of them, files are
completed. After an update of the package, the script is made again.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping

from segvol_pl.config import SCHEMAS
from segvol_pl.config.fields import Field
from segvol_pl.config.loader import fields_help
from segvol_pl.errors import ConfigError

OPTIONS = ("--help", "--debug", "--version")
BOTH = ("pretrain", "train")
WORDS: dict[str, tuple[str, ...]] = {
    "challenge": ("predict",),
    "scaling": ("fit", "compare", "mix"),
    "requeue": (*BOTH, "finetune"),
    "config": tuple(SCHEMAS),
    "completion": ("bash", "zsh", "fish"),
    "finetune": ("from=",),
    "grid": ("run=", "run=all", "out=", "sweep="),
    "plan": ("nodes=", "gpus=", "device=", "volumes=", "corpus_gb=", "coordinates=true"),
}
"""What commands take that no schema has."""
TAKES_KEYS_OF: dict[str, tuple[str, ...]] = {"grid": BOTH, "plan": BOTH, "requeue": (*BOTH, "finetune")}
"""Commands that pass keys on to others."""

BASH = """\
# Completes segvol-pl in bash. In ~/.bashrc: source <(segvol-pl completion bash)
_segvol_pl() {
    local line=${COMP_LINE:0:COMP_POINT} words reply word
    local current=${line##* } command
    read -r _ command _ <<< "$line"
    case $line in
        *' '*' '*) ;;
        *) command= ;;
    esac
    case $command in
        '') words=@COMMANDS@ ;;
@CASES@
        *) words= ;;
    esac
    local IFS=$' \\t\\n'
    reply=($(compgen -W "$words" -- "$current"))
    COMPREPLY=()
    for word in "${reply[@]}"; do
        # Values are shown once their key is written.
        [[ $current != *=* && $word == *=?* ]] || COMPREPLY+=("$word")
    done
    local typed=
    [[ $current == *=* ]] && typed=${current%%=*}=
    if [[ -n $command && ( ${#COMPREPLY[@]} -eq 0 || ${COMPREPLY[*]} == "$typed" ) ]]; then
        compopt -o filenames 2> /dev/null
        COMPREPLY=($(compgen -f -P "$typed" -- "${current#"$typed"}"))
    fi
    # Where = separates words, bash has the key already.
    [[ $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"$typed"}")
    [[ ${COMPREPLY[*]} == *= ]] && compopt -o nospace 2> /dev/null
    return 0
}
complete -F _segvol_pl segvol-pl
"""
ZSH = """\
# Completes segvol-pl in zsh. In ~/.zshrc: source <(segvol-pl completion zsh)
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""


def script(shell: str, commands: Mapping[str, str]) -> str:
    """The script for a shell.

    Args:
        shell: One of `SHELLS`.
        commands: Name of each command -> what it does.

    Raises:
        ConfigError: Another shell.
    """
    if shell not in SHELLS:
        raise ConfigError(f"{shell}: is none of {', '.join(SHELLS)}")
    return SHELLS[shell](commands)


def words_of(command: str) -> list[str]:
    """The words behind a command: KEY=, and KEY=VALUE for each choice of a key."""
    schemas = [name for name in SCHEMAS if name == command or name.startswith(f"{command} ")]
    fields = [field for name in (*schemas, *TAKES_KEYS_OF.get(command, ())) for field in fields_help(name)]
    keys = [
        word for field in fields for word in (f"{field.key}=", *(f"{field.key}={value}" for value in choices(field)))
    ]
    return list(dict.fromkeys([*WORDS.get(command, ()), *keys, *OPTIONS]))


def choices(field: Field) -> list[str]:
    """The values of a key that has choices."""
    if field.type is bool:
        return ["true", "false"]
    return field.type_name.split("|") if "|" in field.type_name else []


def _bash(commands: Mapping[str, str]) -> str:
    cases = "\n".join(f"        {name}) words={shlex.quote(' '.join(words_of(name)))} ;;" for name in commands)
    named = shlex.quote(" ".join([*commands, *OPTIONS]))
    return BASH.replace("@COMMANDS@", named).replace("@CASES@", cases)


def _zsh(commands: Mapping[str, str]) -> str:
    # zsh runs completions that are written for bash.
    return ZSH + _bash(commands).partition("\n")[2]


def _fish(commands: Mapping[str, str]) -> str:
    lines = [
        "# Completes segvol-pl in fish. Once: segvol-pl completion fish > ~/.config/fish/completions/segvol-pl.fish"
    ]
    for name, summary in commands.items():
        first = f"complete -c segvol-pl -f -n __fish_use_subcommand -a {name}"
        lines.append(f"{first} -d {_quoted(summary)}")
        words = " ".join(words_of(name))
        lines.append(f"complete -c segvol-pl -n '__fish_seen_subcommand_from {name}' -a {_quoted(words)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """For fish, in whose single quotes only \\ and ' are special."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


SHELLS: dict[str, Callable[[Mapping[str, str]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
