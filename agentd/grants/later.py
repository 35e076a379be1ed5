"""What runs later: files that the user's own programs will run, or be told by what to run, once they are started again.

Whoever may write one of them can do anything then, unconfined. So a grant for a directory around them does not cover them: only
one that names them does.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from agentd_sandbox import PathRule

from agentd.grants.patterns import within

if TYPE_CHECKING:
    from agentd.grants.patterns import Pattern
    from agentd.grants.scopes import Scope

_AT_HOME = (
    *(".bashrc", ".bash_profile", ".bash_login", ".bash_logout", ".bash_aliases", ".profile", ".inputrc"),
    *(".zshrc", ".zshenv", ".zprofile", ".zlogin", ".zlogout", ".config/zsh", ".config/fish", ".kshrc", ".mkshrc"),
    *(".xprofile", ".xinitrc", ".xsession", ".xsessionrc", ".pam_environment", ".config/environment.d"),
    *(".config/systemd", ".local/share/systemd", ".config/autostart", ".config/cron", ".crontab", ".termux"),
    *(".ssh", ".gitconfig", ".config/git", ".config/direnv", ".direnvrc"),
    *("bin", ".local/bin", ".local/lib"),
)
"""By their paths from the home directory on: shells, logins, sessions, services, times, remote logins, programs in PATH."""
_IN_GIT = ("hooks", "config", "config.worktree", "commondir", "modules", "worktrees")
_ANYWHERE = ("**/.git", *(f"**/.git/{name}{rest}" for name in _IN_GIT for rest in ("", "/**")), "**/.envrc")
_MODULES = ("**/*.pth", "**/sitecustomize.py", "**/usercustomize.py")
"""What every Python of that directory runs when it starts (site)."""
_NAMES = re.compile(
    r"/(\.git/(hooks|config|config\.worktree|commondir|modules|worktrees)|\.envrc|[^/]*\.pth|sitecustomize\.py|usercustomize\.py)(/|$)"
    r"|/\.git$"
)

_GIT = re.compile(r"/\.git(/|$)")
"""A grant for all of it has meant that, too."""


class Later:
    """Of the user with this home directory."""

    def __init__(self, home: Path | None = None) -> None:
        top = (home or Path.home()).resolve()
        self._at_home = tuple(str(top / name) for name in _AT_HOME)
        self.rules = (
            *(PathRule(os.fsencode(path)) for path in self._at_home),
            *(PathRule(os.fsencode(f"/{glob}"), glob=True) for glob in (*_ANYWHERE, *_MODULES)),
        )

    def is_touched(self, scope: Scope) -> bool:
        """Whether a call with this scope changes such a file, or what lies in such a directory, and nothing around it."""
        return scope.kind == "write" and self._names(scope.value)

    def is_named(self, pattern: Pattern) -> bool:
        """Whether somebody who granted this has meant what runs later."""
        return pattern.kind == "write" and (self._names(pattern.value) or _GIT.search(pattern.value) is not None)

    def _names(self, path: str) -> bool:
        return any(within(path, each) for each in self._at_home) or _NAMES.search(path) is not None
