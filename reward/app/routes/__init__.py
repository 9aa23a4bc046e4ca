"""The rooms of the app: each file holds the routes of one, thin over the functions that do the work."""

from reward.app.routes import account, keeping, labeler, lead, lead_quality, reviewer

ROOMS = (account.pages, labeler.pages, reviewer.pages, lead.pages, lead_quality.pages, keeping.pages)
