"""Found by optimum-cli in the namespace `optimum.commands.register`; must stay light."""

from optimum_dsa.commands.dsa import DSACommand


REGISTER_COMMANDS = [DSACommand]
