// The progress of the job that runs: a bar, and a line of text.

import { announce, find } from "./elements.js";

/** Show that a job runs. */
export function showRunning() {
  setRunning(true);
  find("#cancel").disabled = false;
  showState("Sending\u2026");
  announce("Started");
  find("#result").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

/** Show that no job runs. */
export function hideRunning() {
  if (document.activeElement === find("#cancel")) find("#generate").focus();
  setRunning(false);
}

/** Whether a job is shown to run. */
export const isRunning = () => !find("#running").hidden;

function setRunning(runs) {
  find("#running").hidden = !runs;
  find("#generate").setAttribute("aria-disabled", runs);
  find("#result").setAttribute("aria-busy", runs);
}

/** Show a job of which no progress is known. */
export function showState(text) {
  find("#progress").removeAttribute("value");
  find("#running-text").textContent = text;
}

/** Show how far a job is: its place in the queue (0: it runs), the share of its work that is done,
 *  the seconds that are left, or null, and the number of processes that ran it and were lost. */
export function showProgress({ place, share, seconds_left: left, lost_processes: lost }) {
  const time = left === null ? "" : ` \u00b7 about ${duration(left)} left`;
  if (place === 0) {
    find("#progress").value = share;
    find("#running-text").textContent = `${Math.round(share * 100)} %${time}`;
    return;
  }
  const waiting = place > 1 ? `Place ${place} in the queue` : "Next in the queue";
  const again = `Its process was lost. It begins again: ${waiting.toLowerCase()}`;
  const text = lost > 0 ? again : waiting;
  showState(text + time);
  if (find("#live").textContent !== text) announce(text); // a place is said once
}

/** A length of time as a text. */
function duration(seconds) {
  const whole = Math.max(1, Math.ceil(seconds));
  return whole < 90 ? `${whole} s` : `${Math.round(whole / 60)} min`;
}
