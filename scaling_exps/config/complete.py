"""What a shell completes: commands, keys and what they may be. A list that is made once: no Python runs at a Tab."""

from __future__ import annotations

from scaling_exps import rules
from scaling_exps.config.compose import CONF
from scaling_exps.config.schema import keys

# A key is completed up to its next dot or =, so that a list stays short. Where = parts words, bash wants what is behind
# it alone. Behind a command other than plan, files are completed.
_BASH = """\
_scalerun() {
  local line=${COMP_LINE:0:COMP_POINT} words="KEYS" first word c
  word=${line##*[[:space:]]}
  read -r _ first _ <<<"$line"
  COMPREPLY=()
  case $first in "$word") words="COMMANDS $words" ;; plan | *=* | -*) ;; *) return ;; esac
  for c in $(compgen -W "$words" -- "$word"); do
    if [[ $word == *=* ]]; then
      if [[ $COMP_WORDBREAKS == *=* ]]; then c=${c#*=}; fi
    elif [[ ${c#"$word"} =~ ^[^.=]*[.=] ]]; then
      c=$word${BASH_REMATCH[0]}
      compopt -o nospace 2>/dev/null
    fi
    COMPREPLY+=("$c")
  done
}
complete -o default -F _scalerun scalerun
"""
_ZSH = """\
_scalerun() {
  local -a found all=(KEYS)
  local c
  if (( CURRENT == 2 )); then all=(COMMANDS $all); elif [[ $words[2] != (plan|*=*|-*) ]]; then _files; return; fi
  for c in ${(M)all:#$PREFIX*}; do
    if [[ $PREFIX != *=* && ${c#$PREFIX} =~ '^[^.=]*[.=]' ]]; then c=$PREFIX$MATCH; else c="$c "; fi
    found+=("$c")
  done
  compadd -Q -S '' -- $found
}
compdef _scalerun scalerun
"""
_FISH = """\
complete -c scalerun -n __fish_use_subcommand -f -a 'COMMANDS'
complete -c scalerun -n 'not __fish_seen_subcommand_from OTHERS' -f -a 'KEYS'
"""
SHELLS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(shell: str, commands: list[str]) -> str:
    """What the shell is to source; `commands` are completed as the first word, keys there and behind `plan`."""
    words = [f"{group.name}={p.stem}" for group in sorted(CONF.iterdir()) for p in sorted(group.glob("*.yaml"))]
    words += [f"rule={rule}" for rule in rules.RULES]
    for key in keys():
        if key.name != "rule" and not (CONF / key.name).is_dir():
            words += [f"{key.name}={option}" for option in key.options or [""]]
    named = {"KEYS": words, "COMMANDS": commands, "OTHERS": [c for c in commands if c != "plan"]}
    text = SHELLS[shell]
    for name, values in named.items():
        text = text.replace(name, " ".join(dict.fromkeys(values)))
    return text.rstrip()
