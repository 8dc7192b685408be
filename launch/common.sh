# What the scripts of this folder share; they set `dry` for --dry-run.
# shellcheck shell=bash disable=SC2154

fail() {
  echo "error: $1" >&2
  exit 2
}

usage() { # the comment at the top of the script
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  exit 0
}

value() { # value --OPTION VALUE [...]: sets the variable that is called like the option
  [[ ${2:-} ]] || fail "$1 needs a value"
  printf -v "${1#--}" %s "$2"
}

quote() { # words as a shell reads them back
  local word text='' apostrophe="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$apostrophe}'" ;;
    esac
    text+="$word "
  done
  printf %s "${text% }"
}

run() {
  if [[ $dry ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}
