"""The rooms of the app: each file holds the routes of one, thin over the functions that do the work."""

from reward.app.routes import account, labeler

ROOMS = (account.pages, labeler.pages)
